"""A real server under 16 concurrent clients with every kind of request at once."""

import pytest

pytest.importorskip("vllm")

from cacheslide.policies.registry import load_policy
from cacheslide.vllm.options import annotations_of
from harness.backends.client import Request
from harness.backends.http.client import HttpClient
from harness.backends.http.load import closed_loop
from harness.backends.http.server import Server, connector_command, engine_flags
from harness.backends.http.workload import Conversation, Shape
from harness.backends.in_process import EngineOptions

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.server]

MODEL = "models/tiny-llama-12m"
SYSTEMS = [
    *("cacheslide", "cacheslide_first_turn", "cacheslide_promote", "naive_reuse", "cacheblend", "cacheblend_stale"),
    *("epic", "epic_stale", "prompt_cache", "context_cache", "window_padding", "recompute", None, None, None, None),
]
TURNS = 3


def requests(number: int, system: str | None) -> list[Request]:
    """One client's turns; odd ones without a stream, so that both ways of answering are loaded."""
    conversation = Conversation(Shape(400, 1280, chunks=3), 0, number)  # chunks longer than EPIC's 64 edge rows
    out = []
    for turn in range(TURNS):
        prompt, params = conversation.turn(turn), None
        if system is not None:
            prompt = load_policy(system).transform(prompt)
            params = annotations_of(prompt, policy=system)
        labels = {"system": system, "turn": turn}
        name = f"{number}-{turn}"
        out.append(Request(name, prompt.token_ids, 12, params, f"salt-{number}", stream=not turn % 2, labels=labels))
    return out


def test_sixteen_mixed_clients_get_every_answer_and_every_receipt(tmp_path):
    options = EngineOptions(kv_cache_gib=0.5, max_model_len=2048, enforce_eager=True)
    flags = engine_flags(options, "float32")
    command = connector_command(MODEL, {"store_gib": 1, "encode": "now"}, flags)
    clients = [requests(i, system) for i, system in enumerate(SYSTEMS)]
    assert len(clients) == 16
    with Server(command, MODEL, tmp_path / "server.log", eager=True, timeout=900) as server:
        client = HttpClient(server.endpoint)
        load = closed_loop(client, [request for turn in zip(*clients, strict=True) for request in turn], 16)
        again = client.run([c[-1] for c in clients[-4:]])  # plain ones, now with nothing beside them
    assert len(load.results) == 16 * TURNS and not [o.failure for o in load.results if o.failure]
    assert max(sum(p.sent <= o.sent < p.finished for p in load.results) for o in load.results) == 16
    for o in load.results:
        system, turn = o.labels["system"], o.labels["turn"]
        assert o.tokens == 12 and (len(o.token_times) == 12) is (turn % 2 == 0)
        assert (o.receipt is None) is (system is None), o.id
        if system in (None, "recompute", "context_cache"):
            continue
        assert o.receipt["system"] == system and o.receipt["measured"]
        if turn:  # what the turn before left is used
            assert o.receipt["tokens_reused"] > 0 and not o.receipt["fallback"], (system, o.receipt)
    alone = {o.id: o.text for o in again}
    beside = {o.id: o.text for o in load.results if o.id in alone}
    assert alone == beside
