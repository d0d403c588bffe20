"""Async scheduling: a step is planned before the one before it has been reported. vLLM switches it off on a CPU, for
want of streams and not of meaning; here it is switched on again, with streams that do nothing."""

from contextlib import closing

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from cacheslide.core.prompt import Prompt
from cacheslide.models.reference import ReferenceDecoder
from cacheslide.vllm.options import annotations_of
from tests.helpers.checkpoints import save_random
from tests.helpers.idle_streams import idle_streams
from tests.helpers.lives import life, same
from tests.helpers.served import FIRST, SECOND, SHAPE, Served, logprobs, receipt, tokens
from tests.helpers.talks import BLOCKS, Talk, assert_exact
from tests.helpers.token_ids import random_ids

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("vllm_environment")]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("async"), **SHAPE)


def test_chunks_come_back_from_files(path, tmp_path):  # the first test: a process has one connector at a time
    """Steps are planned while a read is under way, and beside requests that decode."""
    with idle_streams():
        with life(path, tmp_path / "s") as engine:
            engine.one(FIRST)
            warm = engine.one(SECOND)
            plain = engine.plain(FIRST, 12)
        with life(path, tmp_path / "s") as engine:
            assert isinstance(engine.core.scheduler, AsyncScheduler) and engine.core.batch_queue is not None
            from_disk = engine.one(SECOND)
            assert same(from_disk, warm) and set(receipt(from_disk)["tiers"]) == {"file"}
            assert receipt(from_disk)["chunks_hit"] == receipt(from_disk)["chunks"] and receipt(from_disk)["measured"]
            engine.worker.store.drop(engine.scheduler.index.keys())
            engine.scheduler.index.clear()
            engine.poison()
            annotations = [None, annotations_of(SECOND), annotations_of(SECOND)]
            beside, *both = engine.ask([FIRST, SECOND, SECOND], annotations, 12)
            assert tokens(beside) == tokens(plain)
            for found in map(receipt, both):
                assert set(found["tiers"]) == {"file"} and found["chunks_hit"] == found["chunks"]
            assert not engine.scheduler.storage_tier.coming and not engine.scheduler.index._leases


@pytest.fixture(scope="module")
def served(path, vllm_environment):
    settings = {"num_gpu_blocks_override": BLOCKS, "max_model_len": 320}
    with idle_streams(), closing(Served(path, engine=settings, max_generation=2)) as engine:
        assert isinstance(engine.core.scheduler, AsyncScheduler) and engine.core.batch_queue is not None
        yield engine


def test_reuse_is_what_it_is_without(served):
    served.fresh()
    truth = served.plain(SECOND)
    served.poison()
    served.one(FIRST)
    served.poison()
    full = served.one(SECOND, recompute_ratio=1.0)
    assert receipt(full)["chunks_hit"] > 0 and tokens(full) == tokens(truth)
    torch.testing.assert_close(logprobs(full), logprobs(truth), atol=1e-4, rtol=1e-4)


def test_a_load_that_fails_starts_its_request_over(served, monkeypatch):
    """The next step has been planned, and sampled from the missing rows: what it says is not delivered."""
    served.fresh()
    truth = [served.plain(p, 12) for p in (SECOND, FIRST)]
    served.poison()
    served.one(FIRST)
    served.poison()
    with monkeypatch.context() as patch:
        patch.setattr(served.worker, "load", lambda step: None)
        batch = [
            annotations_of(SECOND, recompute_ratio=1.0),
            None,
            annotations_of(SECOND, recompute_ratio=1.0, policy="epic"),
        ]
        got = served.ask([SECOND, FIRST, SECOND], batch, 12)
    for output, want in zip(got, (truth[0], truth[1], truth[0]), strict=True):
        assert tokens(output) == tokens(want)
        for at in range(12):
            torch.testing.assert_close(logprobs(output, at), logprobs(want, at), atol=1e-4, rtol=1e-4)
    assert receipt(got[0])["fallback"] == "fault at start_load_kv" and receipt(got[0])["tokens_reused"] == 0
    served.poison()
    again = served.one(SECOND, recompute_ratio=1.0)  # and its blocks are nobody's
    assert receipt(again)["chunks_hit"] > 0 and tokens(again) == tokens(truth[0])[:4]
    assert not served.scheduler.tracked and not served.scheduler.running and not served.scheduler.claims.blocks


def test_a_batch_beside_ordinary_requests(served):
    served.fresh()
    served.one(FIRST)
    batch = [
        (SECOND, annotations_of(SECOND, recompute_ratio=0.5)),
        (FIRST, None),
        (SECOND, annotations_of(SECOND, policy="epic")),
        (SECOND, None),
    ]
    alone = []
    for prompt, annotations in batch:
        served.poison()
        alone += served.ask([prompt], [annotations], tokens=12)
    served.poison()
    together = served.ask([p for p, _ in batch], [m for _, m in batch], tokens=12)
    for got, want, (_, annotations) in zip(together, alone, batch, strict=True):
        assert tokens(got) == tokens(want)
        if annotations is not None and not receipt(got)["tokens_prefix_cached"]:
            assert receipt(got)["tokens_reused"] == receipt(want)["tokens_reused"] and receipt(got)["measured"]
    assert not served.scheduler.tracked and not served.scheduler.running


def test_history_is_retained_though_the_next_step_was_planned_already(served, path):
    """The pool holds little more than one request: blocks change hands while the finished one is still in flight."""
    reference = ReferenceDecoder.from_pretrained(path)
    cos, sin = served.worker.model.layers[0].self_attn.rotary_emb.cos_sin_cache.chunk(2, dim=-1)
    rotary = reference.rotaries[0]
    rotary.cos, rotary.sin = cos, sin
    served.fresh()
    talk = Talk(served, policy="naive_reuse")
    waiting = [Prompt.from_spans(random_ids(150, 300 + i), []) for i in range(3)]
    kinds = []
    for turn in range(5):
        got, ids = talk.say(beside=waiting)
        retained = got["history"]
        kinds.append(retained["generation"] if retained["from"] == "blocks" else "anew")
        assert got["chunks_hit"] == (got["chunks"] if turn else 0)
        if kinds[-1] in (0, "anew"):
            assert_exact(served, reference, ids, retained["start"], retained["end"])
    assert kinds == [0, 1, 2, "anew", 1]
