"""Remembered deviation inside vLLM: chunks get the scores that the reference engine gives them, and rules read them."""

from contextlib import closing

import pytest
import torch

pytest.importorskip("vllm")

from cacheslide import ReuseEngine
from cacheslide.policies import registry
from cacheslide.store import MemoryChunkStore
from tests.helpers.checkpoints import save_random
from tests.helpers.remembering import policy_of
from tests.helpers.served import CHUNK, FIRST, SECOND, SHAPE, Served, assert_same, receipt
from tests.helpers.served import reference as reference  # its fixture, over this file's engine
from tests.helpers.settling import settle

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("vllm_environment", "registered")]

SYSTEMS = {"remembering": "in_prompt", "remembering_chain": "fixed_chain", "remembering_alone": "isolated"}


@pytest.fixture(scope="module")
def registered():
    before, own = registry._own, {name: lambda e=e: policy_of(e) for name, e in SYSTEMS.items()}
    registry._own = before | own
    yield
    registry._own = before


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("scores"), **SHAPE)


@pytest.fixture(scope="module")
def served(path):
    with closing(Served(path)) as engine:
        yield engine


def scores_of(served, keys) -> list:
    return [served.worker.store.get(key).scores for key in keys]


@pytest.mark.parametrize("system", SYSTEMS)
def test_chunks_have_the_scores_of_the_reference_engine_and_the_rule_reads_them(served, reference, system):
    engine = ReuseEngine(reference, policy_of(SYSTEMS[system]), MemoryChunkStore(), chunk_size=CHUNK)
    engine.build(FIRST)
    want = engine.prefill(SECOND)
    served.fresh()
    served.one(FIRST, policy=system)
    settle(served)
    held = {key: served.worker.store.get(key) for key in list(served.worker.store._chunks)}
    wanted = [engine.store.get(key).scores for key in engine.plan(FIRST).keys]
    assert len(held) == len(wanted) > 10
    served.poison()
    got = served.one(SECOND, 1, policy=system)
    keys = served.plans[-1].plan.keys
    for key, scores in zip(keys, wanted, strict=True):
        assert held[key].scores.device.type == "cpu"
        torch.testing.assert_close(held[key].scores, scores, atol=1e-4, rtol=1e-3)
    assert max(float(s.max()) for s in wanted) > 0.1
    said = receipt(got)
    for name in ("tokens_reused", "tokens_recomputed", "chunks_hit", "bytes_loaded"):
        assert said[name] == getattr(want.receipt, name), name
    assert said["tokens_recomputed"] > 30 and not said["fallback"]
    [load] = served.plans[-1:]
    assert load.correction.needs_scores
    rows = len(SECOND) - len(SECOND) % 32
    k, v = served.kv(rows)
    assert_same(k, want.kv.k[:, :rows], 1e-4)
    assert_same(v, want.kv.v[:, :rows], 1e-4)


def test_other_systems_have_no_scores_and_chunks_without_get_theirs_later(served):
    """Two systems of one keying and encoding share chunks: the one that needs scores has them made."""
    served.fresh()
    served.one(FIRST, policy="naive_reuse")
    settle(served)
    held = list(served.worker.store._chunks)
    assert len(held) > 10 and scores_of(served, held) == [None] * len(held)
    served.poison()
    assert receipt(served.one(SECOND, 1, policy="remembering"))["tokens_recomputed"] == 0  # nothing to go by
    settle(served)
    assert all(s is not None for s in scores_of(served, held)) and served.scheduler.index.scored == set(held)
    served.poison()
    assert receipt(served.one(SECOND, 1, policy="remembering"))["tokens_recomputed"] > 30


def test_jobs_that_may_wait_are_done_when_the_engine_is_idle(served):
    served.fresh()
    served.one(FIRST, policy="remembering_chain", encode="later")
    settle(served)
    held = list(served.worker.store._chunks)
    assert len(held) > 10 and all(s is not None for s in scores_of(served, held))


def test_a_fault_while_scoring_leaves_chunks_without_scores(served, monkeypatch):
    served.fresh()

    def fails(*args, **kwargs):
        raise RuntimeError("no scores today")

    monkeypatch.setattr("cacheslide.core.remembering.remembered_deviation", fails)
    served.one(FIRST, policy="remembering")
    settle(served)
    held = list(served.worker.store._chunks)
    first = served.scheduler.retention
    assert len(held) > 10 and not first.pending and served.worker.faults.total["score"] > 0
    with_scores = [key for key in held if served.worker.store.get(key).scores is not None]
    assert len(with_scores) == 1  # the one in front of the updated text: its contexts are one
    assert not served.worker.store.awaiting
    monkeypatch.undo()
    served.poison()
    assert receipt(served.one(SECOND, 1, policy="remembering"))["chunks_hit"] > 10


def test_generated_history_has_scores_where_it_is_exact(served):
    from tests.helpers.talks import Talk

    served.fresh()
    talk = Talk(served, policy="remembering")
    generations = [talk.say()[0]["history"]["generation"] for _ in range(3)]
    settle(served)
    held = {k: served.worker.store.get(k) for k in list(served.worker.store._chunks)}
    assert generations == [0, 1, 2]
    for chunk in held.values():
        assert (chunk.scores is None) == (chunk.generation > 0)
    assert {chunk.generation for chunk in held.values()} == {0, 1, 2}
