"""One client protocol: the same tests over the reference engine, vLLM in this process, and a real server."""

from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from cacheslide import ReuseEngine, load_policy
from cacheslide.core.prompt import Prompt
from cacheslide.errors import ConfigError, PromptError
from cacheslide.store import MemoryChunkStore
from cacheslide.vllm.options import annotations_of
from harness.backends.client import Client, Request, Result
from harness.backends.http.client import HttpClient
from harness.backends.http.load import closed_loop
from harness.backends.http.server import Server, connector_command, engine_flags
from harness.backends.http.summary import no_speed
from harness.backends.http.workload import Conversation, Shape
from harness.backends.in_process import EngineOptions, InProcessEngine
from harness.backends.reference import ReferenceBackend
from harness.backends.reference_client import ReferenceClient

pytestmark = [pytest.mark.usefixtures("environment_after"), pytest.mark.slow]

MODEL = "models/tiny-llama-12m"
SERVED = [pytest.mark.vllm, pytest.mark.slow]
KINDS = [
    "reference",
    pytest.param("vllm", marks=SERVED),
    pytest.param("http", marks=[*SERVED, pytest.mark.server]),
]
OPTIONS = EngineOptions(kv_cache_gib=0.25, max_model_len=1024, enforce_eager=True, store_gib=0.5)
LONG = 9000  # tokens: more than any of the three takes
TEXT = "the painter found the new door . brave ibex follows amber falcon ."


@pytest.fixture(scope="module")
def backend() -> ReferenceBackend:
    return ReferenceBackend(MODEL)


@contextmanager
def opened(kind: str, backend: ReferenceBackend, folder: Path):
    """A client of that kind over the same checkpoint, with the connector and its default system."""
    if kind == "reference":
        with ReferenceClient(backend, load_policy("cacheslide")) as client:
            yield client
        return
    pytest.importorskip("vllm")
    connector = {"encode": "now"}
    if kind == "vllm":
        with InProcessEngine(MODEL, "float32", "cpu", OPTIONS, connector, texts=True) as client:
            yield client
        return
    command = connector_command(MODEL, {"store_gib": 0.5, **connector}, engine_flags(OPTIONS, "float32"))
    server = Server(command, MODEL, folder / "server.log", eager=True)
    with server, HttpClient(replace(server.endpoint, token_ids=True)) as client:
        yield client


@pytest.fixture(scope="module", params=KINDS)
def client(request, backend, tmp_path_factory):
    with opened(request.param, backend, tmp_path_factory.mktemp("client")) as client:
        yield client


def conversation(number: int, tokens: int = 400) -> Conversation:
    return Conversation(Shape(tokens, 1280, chunks=3), 5, number)


def prompts(count: int) -> list[tuple[int, ...]]:
    """Different prompts of different lengths."""
    return [conversation(n, 150 + 17 * n).turn(0).token_ids for n in range(count)]


def greedy(backend: ReferenceBackend, ids, tokens: int) -> list[int]:
    """What the model says, by the engine itself."""
    engine = ReuseEngine(backend.model, load_policy("recompute"), MemoryChunkStore())
    state = engine.prefill(Prompt.from_spans(ids, ()), room=tokens)
    return engine.generate(state, state.logits, tokens, frozenset())


def marked(number: int, turn: int, salt: str, tokens: int = 5, **marks) -> Request:
    prompt = conversation(number).turn(turn)
    return Request(f"{number}-{turn}", prompt, tokens, annotations_of(prompt, **marks), salt)


def one(client: Client, request: Request) -> Result:
    [result] = client.run([request])
    return result.checked()


def test_every_client_gives_the_models_own_greedy_answer(client, backend):
    asked = prompts(3)
    results = client.run([Request(str(i), ids, 6, labels={"i": i}) for i, ids in enumerate(asked)])
    for i, (ids, result) in enumerate(zip(asked, results, strict=True)):
        assert (result.id, result.labels, result.failure) == (str(i), {"i": i}, "")
        assert result.token_ids == greedy(backend, ids, 6) and result.stop_id is None
        assert result.finish_reason == "length" and result.tokens == len(result.token_times) == 6
        assert result.prompt_tokens == len(ids) and result.receipt is None
        assert result.text == backend.tokenizer.decode(result.token_ids, skip_special_tokens=True)
        assert result.sent < result.token_times[0] and result.token_times == sorted(result.token_times)
        assert result.finished >= result.token_times[-1] and 0 < result.ttft <= result.seconds


def test_a_text_is_the_prompt_of_its_tokens(client, backend):
    ids = [backend.tokenizer.bos_token_id, *backend.encode(TEXT)]
    by_ids, by_text = client.run([Request("ids", ids, 5), Request("text", TEXT, 5)])
    assert by_text.checked().token_ids == by_ids.checked().token_ids and by_text.prompt_tokens == len(ids)


@pytest.mark.parametrize("system", ["cacheslide", "epic"])
def test_a_second_turn_reuses_what_the_first_left_and_the_receipt_says_so(client, backend, system):
    salt = f"turns-{system}"
    first, second = (one(client, marked(1, turn, salt, policy=system)) for turn in range(2))
    engine = ReuseEngine(backend.model, load_policy(system), MemoryChunkStore())
    engine.build(conversation(1).turn(0))
    state = engine.prefill(conversation(1).turn(1), room=5)
    assert second.token_ids == engine.generate(state, state.logits, 5, frozenset())
    want = state.receipt.as_dict()
    for name in ("system", "tokens", "tokens_reused", "tokens_recomputed", "chunks", "chunks_hit"):
        assert second.receipt[name] == want[name], name
    assert first.receipt["chunks_hit"] == 0 and "no chunk" in first.receipt["fallback"]
    assert want["chunks_hit"] == 3 and want["tokens_reused"] > 0 and not second.receipt["fallback"]


def test_salts_keep_requests_apart(client):
    one(client, marked(2, 0, "mine"))
    assert one(client, marked(2, 1, "other")).receipt["chunks_hit"] == 0
    assert one(client, marked(2, 1, "mine")).receipt["chunks_hit"] == 3


def test_an_answer_ends_before_its_stop_id(client, backend):
    [ids] = prompts(1)
    whole = greedy(backend, ids, 8)
    at = next(i for i in range(1, 8) if whole[i] not in whole[:i])
    result = one(client, Request("stop", ids, 8, stop_ids=frozenset({whole[at]})))
    assert result.token_ids == whole[:at] and result.stop_id == whole[at] and result.generated == whole[: at + 1]
    assert result.finish_reason == "stop" and result.tokens == len(result.token_times) == at + 1


def test_an_answer_ends_before_its_stop_text(client, backend):
    ids = [backend.tokenizer.bos_token_id, *backend.encode(TEXT)]
    whole = one(client, Request("whole", ids, 8))
    word = whole.text.split()[1]
    result = one(client, Request("stop", ids, 8, stop=[word]))
    assert result.text == whole.text.split(word, 1)[0] and result.finish_reason == "stop"
    assert result.token_ids == whole.token_ids[: result.tokens] and len(result.token_times) == result.tokens < 8
    assert word in backend.tokenizer.decode(result.token_ids) and result.stop_id is None


def test_a_request_that_is_refused_fails_alone_in_one_line(client, backend):
    [ids] = prompts(1)
    bad = {"cacheslide": {"segments": [[0, 10**6]]}}
    asked = [
        Request("good", ids, 3),
        Request("long", (ids * LONG)[:LONG], 3, labels={"why": "long"}),
        Request("marks", ids, 3, bad),
        Request("empty", [], 3),
        Request("foreign", [*ids, 10**6], 3),
        Request("last", ids, 3),
    ]
    for clients in (None, 1):
        results = client.run(asked, clients)
        assert [r.id for r in results] == [r.id for r in asked] and results[1].labels == {"why": "long"}
        good, *refused, last = results
        assert good.checked().token_ids == last.checked().token_ids == greedy(backend, ids, 3)
        for result in refused:
            assert result.failure and "\n" not in result.failure and "Traceback" not in result.failure
            assert not result.token_ids and result.ttft is None and result.finished >= result.sent
            with pytest.raises(PromptError) as told:
                result.checked()
            assert str(told.value) == result.failure
        assert "1024" in refused[0].failure or "positions" in refused[0].failure
        assert "10" in refused[1].failure and "span" in refused[1].failure


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"max_tokens": 0}, "max_tokens must be a count of at least 1, not 0"),
        ({"max_tokens": 1.5}, "max_tokens must be a count"),
        ({"stop": [""]}, "stop must be texts of at least one character"),
        ({"stop": "ab"}, "stop must be texts"),
        ({"prompt": "\ud800"}, "half of a surrogate pair"),
    ],
)
def test_a_wrong_value_fails_its_own_request_only(backend, wrong, why):
    good = Request("good", prompts(1)[0], 2)
    with ReferenceClient(backend, load_policy("cacheslide")) as client:
        failed, done = client.run([replace(good, id="wrong", **wrong), good])
    assert why in failed.failure and failed.tokens == 0 and not done.failure and done.tokens == 2


def test_four_clients_get_the_answers_that_one_gets(client, backend):
    lengths = [5, 1, 3, 2, 6, 1, 4, 2]
    asked = [Request(str(i), ids, n) for i, (ids, n) in enumerate(zip(prompts(8), lengths, strict=True))]
    alone, together = client.run(asked, 1), client.run(asked, 4)
    assert [r.checked().token_ids for r in alone] == [r.checked().token_ids for r in together]
    assert [r.id for r in together] == [r.id for r in asked] and [r.tokens for r in together] == lengths
    assert all(a.finished <= b.sent for a, b in pairwise(alone))
    for number in range(4):  # each waits for its answer
        assert together[number].finished <= together[number + 4].sent
    assert max(sum(p.sent <= r.sent < p.finished for p in together) for r in together) == 4
    assert client.run([], 3) == []
    with pytest.raises(ConfigError, match="at least 1 client"):
        client.run(asked, 0)


def test_any_client_bears_a_closed_loop(client):
    turns = [[marked(n, turn, "loop") for n in (3, 4)] for turn in range(3)]
    assert no_speed(closed_loop(client, turns[0], 2)) == "nothing was reused in 2 of 2 requests"
    load = closed_loop(client, [*turns[1], *turns[2]], 2)
    assert not no_speed(load) and len(load.results) == 4
    assert load.seconds >= max(r.seconds for r in load.results) and load.started == load.results[0].sent


def test_reset_forgets_every_chunk_where_a_client_may(client):
    if isinstance(client, HttpClient):
        with pytest.raises(ConfigError, match="salt of their own"):
            client.reset()
        return
    one(client, marked(6, 0, "reset"))
    assert one(client, marked(6, 1, "reset")).receipt["chunks_hit"] == 3
    client.reset()
    assert one(client, marked(6, 1, "reset")).receipt["chunks_hit"] == 0


def test_a_record_has_the_columns_that_files_have():
    result = Result("a", 10.0, 12.5, [11.0, 12.0], 2, "x y", labels={"system": "s"}, token_ids=[3, 4], stop_id=1)
    assert list(result.as_record(9.0).items()) == [
        ("system", "s"),
        ("id", "a"),
        ("sent", 1.0),
        ("finished", 3.5),
        ("token_times", [2.0, 3.0]),
        ("tokens", 2),
        ("finish_reason", None),
        ("prompt_tokens", None),
        ("cached_tokens", None),
        ("receipt", None),
        ("failure", ""),
        ("ttft", 1.0),
        ("tpot", 1.0),
    ]
