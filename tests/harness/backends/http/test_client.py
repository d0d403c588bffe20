"""The HTTP client against a small server: times, receipts, failures, loads; and a server that does not start."""

import asyncio
import json
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
from aiohttp import web

from cacheslide.errors import ConfigError
from harness.backends.client import Request
from harness.backends.http import server as client_server
from harness.backends.http.client import HttpClient
from harness.backends.http.load import closed_loop, open_loop
from harness.backends.http.server import Server, ServerError, connector_command, engine_flags, vanilla_command
from harness.backends.http.stream import Endpoint
from harness.backends.http.summary import no_speed, summarize_load
from harness.load import Poisson
from tests.helpers.waiting import eventually, released

pytestmark = pytest.mark.slow

GAP = 0.02
RECEIPT = {"tokens_reused": 7, "tokens_recomputed": 2, "compute_fraction": 0.5, "fallback": ""}


def chunk(tokens: int, text: str = "x", finish: str | None = None) -> dict:
    usage = {"prompt_tokens": 9, "completion_tokens": tokens}
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}], "usage": usage}


def event(content) -> bytes:
    return f"data: {content if isinstance(content, str) else json.dumps(content)}\n\n".encode()


class Served:
    """Streams `max_tokens` tokens, two in the second piece; the first id of the prompt chooses how it goes wrong."""

    def __init__(self) -> None:
        self.bodies, self.running, self.most = [], 0, 0
        self.least = 0  # answers wait until so many requests have been at work at once

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        way, asked = body["prompt"][0], body["max_tokens"]
        if way == 1:
            return web.Response(status=400, text="malformed marks")
        self.running += 1
        self.most = max(self.most, self.running)
        while self.most < self.least:
            await asyncio.sleep(0.001)
        try:
            return await self._stream(request, way, asked)
        finally:
            self.running -= 1

    async def _stream(self, request: web.Request, way: int, asked: int) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        sent, pieces = 0, [1, 2] + [1] * asked
        while sent < asked:
            await asyncio.sleep(GAP)
            sent = min(asked, sent + pieces.pop(0))
            data = event(chunk(sent, finish="length" if sent == asked else None))
            await response.write(data[:9])  # torn on its way
            await asyncio.sleep(0.001)
            await response.write(data[9:])
            if way == 2 and sent > 1:
                await response.write(event({"error": {"message": "the engine died"}}))
            if way == 3 and sent > 1:
                return response
        if way == 4:
            last = {"choices": [], "kv_transfer_params": {"cacheslide": RECEIPT}}
            await response.write(event(last) + event({"choices": [], "usage": chunk(asked)["usage"]}))
        await response.write(event("[DONE]"))
        return response


@pytest.fixture(scope="module")
def served():
    served, loop, ready = Served(), asyncio.new_event_loop(), threading.Event()
    found = {}

    async def start() -> None:
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/v1/completions", served.completions)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        found.update(port=site._server.sockets[0].getsockname()[1], runner=runner)
        ready.set()

    thread = threading.Thread(target=lambda: (loop.run_until_complete(start()), loop.run_forever()), daemon=True)
    thread.start()
    assert ready.wait(60)
    served.client = HttpClient(Endpoint(f"http://127.0.0.1:{found['port']}", "m"))
    yield served
    asyncio.run_coroutine_threadsafe(found["runner"].cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


@contextmanager
def meeting(served: Served, n: int):
    """No request is answered before `n` of them are there; one that an earlier test gave up has gone."""
    assert eventually(lambda: not served.running)
    served.most, served.least = 0, n
    try:
        yield
    finally:
        served.least = 0


def request(name: str, way: int = 0, tokens: int = 4, **more) -> Request:
    return Request(name, (way, 5, 6), tokens, **more)


def plain_client(served: Served) -> HttpClient:
    """For a server that is not known to be vLLM."""
    return HttpClient(Endpoint(served.client.endpoint.url, "m", extensions=False))


def test_every_token_has_its_time_and_the_receipt_is_kept(served):
    load = closed_loop(served.client, [request("a", 4, labels={"system": "x"})], 1)
    [out] = load.results
    assert not out.failure and out.receipt == RECEIPT and out.text == "xxx" and out.finish_reason == "length"
    assert len(out.token_times) == out.tokens == 4 and out.token_times[1] == out.token_times[2]
    assert out.ttft >= GAP and out.token_times == sorted(out.token_times) and out.finished >= out.token_times[-1]
    assert out.tpot == pytest.approx((out.token_times[3] - out.token_times[0]) / 3)
    record = json.loads(json.dumps(out.as_record(load.started)))
    assert record["system"] == "x" and 0 <= record["sent"] < record["token_times"][0] < record["finished"]


def test_a_request_says_no_more_than_the_server_understands(served):
    marks = {"cacheslide": {"segments": [[0, 2]]}}
    served.client.run([request("a", params=marks, salt="s")])
    body = served.bodies[-1]
    assert body["prompt"] == [0, 5, 6] and body["kv_transfer_params"] == marks and body["cache_salt"] == "s"
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True} and body["ignore_eos"]
    plain_client(served).run([request("b")])
    plain = {"model": "m", "prompt": [0, 5, 6], "max_tokens": 4, "temperature": 0, "stream": True}
    assert served.bodies[-1] == plain | {"stream_options": {"include_usage": True}}
    ids = replace(served.client.endpoint, token_ids=True)
    HttpClient(ids).run([request("c", stop=["\n"], stop_ids=frozenset({7, 3}), ignore_eos=False)])
    body = served.bodies[-1]
    assert body["stop"] == ["\n"] and body["stop_token_ids"] == [3, 7] and not body["ignore_eos"]
    assert body["return_token_ids"]


def test_what_a_server_cannot_be_asked_is_a_failure(served):
    before = len(served.bodies)
    [cached] = served.client.run([request("a", read_prefix_cache=False)])
    [stopped] = plain_client(served).run([request("b", stop_ids=frozenset({7}))])
    assert "salt of their own" in cached.failure and "give stop texts" in stopped.failure
    assert len(served.bodies) == before
    with pytest.raises(ConfigError, match="salt of their own"):
        served.client.reset()


@pytest.mark.parametrize(("way", "reason"), [(1, "HTTP 400: malformed"), (2, "engine died"), (3, "broke off")])
def test_failures_are_kept_apart_with_their_reason(served, way, reason):
    load = closed_loop(served.client, [request("bad", way), request("good", 4)], 1)
    bad, good = load.results
    assert reason in bad.failure and not good.failure
    summary = summarize_load(load)
    assert (summary["requests"], summary["failures"], summary["ttft_median"]["n"]) == (2, 1, 1)
    assert "1 of 2 requests failed" in no_speed(load)


def test_a_timeout_is_a_failure(served):
    impatient = HttpClient(Endpoint(served.client.endpoint.url, "m", timeout=2 * GAP))
    [out] = impatient.run([request("slow", tokens=9)])
    assert "Timeout" in out.failure and len(out.token_times) < 9


def test_nothing_listens():
    [out] = HttpClient(Endpoint("http://127.0.0.1:9", "m")).run([request("lost")])
    assert "Cannot connect" in out.failure and out.ttft is None


def test_a_closed_loop_waits_for_its_answers(served):
    with meeting(served, 2):
        load = closed_loop(served.client, [request(f"{c}-{i}", 4) for i in range(3) for c in range(2)], 2)
    assert served.most == 2 and len(load.results) == 6
    for client in "01":
        own = [o for o in load.results if o.id.startswith(client)]
        assert all(a.finished <= b.sent for a, b in pairwise(own))
    summary = summarize_load(load)
    assert summary["failures"] == 0 and summary["tokens_reused"] == 7 and summary["compute_fraction"] == 0.5
    assert summary["ttft_median"]["low"] <= summary["ttft_median"]["value"] <= summary["ttft_median"]["high"]
    assert summary["requests_per_second"] == pytest.approx(6 / load.seconds) and not no_speed(load)


def test_an_open_loop_does_not_wait(served):
    with meeting(served, 6):
        load = open_loop(served.client, [request(str(i), 4, tokens=12) for i in range(6)], rate=200)
    assert served.most == 6 and [o.id for o in load.results] == [*"012345"] and not no_speed(load)


def test_arrivals_are_a_poisson_process_of_the_seed():
    times = Poisson(40.0, 3).times(4000)
    gaps = [b - a for a, b in pairwise([0.0, *times])]
    assert times == Poisson(40.0, 3).times(4000) != Poisson(40.0, 4).times(4000)
    mean = sum(gaps) / len(gaps)
    spread = (sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(1 / 40, rel=0.06) and spread == pytest.approx(mean, rel=0.1)  # exponential: equal
    with pytest.raises(ConfigError, match="rate is above 0"):
        Poisson(0)


def test_no_speed_without_reuse(served):
    assert "nothing was reused in 1 of 2" in no_speed(closed_loop(served.client, [request("a"), request("b", 4)], 1))


def test_a_server_that_dies_is_told_with_its_last_words(tmp_path):
    command = [sys.executable, "-c", "import sys; print('no such model'); sys.exit(3)"]
    with (
        pytest.raises(ServerError, match=r"status 3 before it answered:\nno such model"),
        Server(command, "m", tmp_path / "log"),
    ):
        pass


def test_a_server_that_never_answers_is_ended_with_its_children(tmp_path, monkeypatch):
    log, held = tmp_path / "log", tmp_path / "held"
    child = f"""
import fcntl, time
held = open({str(held)!r}, 'w')
fcntl.flock(held, fcntl.LOCK_EX)
print('waiting', flush=True)
time.sleep(600)"""
    command = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"]

    def patience() -> float:  # begins to end when the child is there
        return time.monotonic() if log.stat().st_size else 0.0

    monkeypatch.setattr(client_server, "time", SimpleNamespace(monotonic=patience, sleep=time.sleep))
    server = Server(command, "m", log, timeout=2)
    with pytest.raises(ServerError, match=r"did not answer within 2 s:\nwaiting"), server:
        pass
    assert server.process is None and eventually(lambda: released(held))


def test_command_lines():
    from harness.backends.in_process import EngineOptions

    flags = engine_flags(EngineOptions(max_model_len=64, enforce_eager=True, kv_cache_gib=0.5), "bfloat16")
    assert flags[:2] == ["--dtype", "bfloat16"] and "--enforce-eager" in flags and "--store-gib" not in flags
    assert flags[flags.index("--kv-cache-memory-bytes") + 1] == str(2**29)
    assert "--enforce-eager" not in engine_flags(EngineOptions(), "bfloat16")
    line = connector_command("m", {"store_gib": 2, "policy": "epic"}, flags)
    assert line[2:8] == ["cacheslide.cli.serve", "m", "--store-gib", "2", "--policy", "epic"]
    assert "--no-enable-prefix-caching" in vanilla_command("m", False, flags)
