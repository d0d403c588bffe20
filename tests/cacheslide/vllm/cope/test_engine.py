"""CoPE models inside vLLM (CPU): parity with the reference model, reuse, batches, prefix cache, ranks."""

import os

import pytest
import torch

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.sampling_params import BeamSearchParams

from cacheslide.core.engine import ReuseEngine
from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.positions.ccpe import slots_in
from cacheslide.store import MemoryChunkStore
from cacheslide.training.load import load_cope
from cacheslide.vllm.offline import beam_search
from cacheslide.vllm.options import annotations_of, policy_of
from tests.helpers.adapter_protocol import check
from tests.helpers.checkpoints import save_random, save_random_adapter
from tests.helpers.rank_processes import last_line
from tests.helpers.served import BLOCK, CHUNK, assert_same, logprobs, receipt, tokens
from tests.helpers.token_ids import random_ids
from tests.helpers.vllm_cope import (
    CLOSE,
    FIRST,
    SECOND,
    SHAPE,
    SLOTS,
    Cope,
    assert_follows,
    exact,
    said,
    save_base,
    save_setup,
    turn,
)

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("vllm_environment")]

SYSTEMS = {
    "cacheslide": {"layer": 2},
    "cacheslide_promote": {},
    "cacheblend": {},
    "cacheblend_gradual": {"recompute_ratio": 0.4},
    "prompt_cache": {},
    "prompt_cache_joint": {},
    "epic": {"recompute_ratio": 0.26},
    "naive_reuse": {},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(path, tmp_path_factory):
    return save_setup(tmp_path_factory.mktemp("adapter"), path)


def test_llama_has_it_too(tmp_path):  # the first test: a process has one connector at a time
    path = save_random(tmp_path / "llama", **SHAPE)
    adapter = save_random_adapter(tmp_path / "adapter", path)
    engine = Cope(path, adapter)
    engine.poison()
    assert_follows(engine.plain(SECOND), load_cope(path, adapter), SECOND, served=engine)
    engine.core.shutdown()


@pytest.fixture(scope="module")
def served(path, adapter):
    engine = Cope(path, adapter)
    yield engine
    engine.core.shutdown()


@pytest.fixture(scope="module")
def live(path, adapter):
    return load_cope(path, adapter, live=True)


@pytest.fixture(scope="module")
def calibrated(path, adapter):
    """The reference model with slot offsets."""
    return load_cope(path, adapter)


def test_chunk_keys_cover_adapter_and_calibration(served, live, calibrated):
    geometry = served.scheduler.planner.geometry
    digests = [model.model_id.split(" ", 1)[1] for model in (live, calibrated)]  # without the base's part
    assert geometry.model_id.endswith(digests[1]) and digests[0] != digests[1] and geometry.slots == SLOTS


def test_the_adapter_is_complete(served):
    check(served.worker.model)


def test_a_plain_request_is_the_reference_model(served, live):
    served.fresh()
    assert_follows(served.plain(SECOND), live, SECOND, served=served)


@pytest.mark.parametrize("last_row_alone", [False, True])
def test_an_annotated_request_crosses_its_slots_by_their_offsets(served, calibrated, live, last_row_alone):
    prompt = turn(3, 53)
    if last_row_alone:  # in steps of 128: the last one, of a fixed chunk near its slot, comes as a decoded one
        last = Segment(random_ids(4, 30), Role.REUSE)
        prompt = Prompt((*turn(3, 2 * 128 + 1 - (40 + 90 + 9 + 4)).segments[:4], last))
        assert len(prompt) == 2 * 128 + 1
    slots = slots_in(prompt)
    assert len(slots.bounds) == SLOTS
    served.fresh()
    output = served.one(prompt, policy="recompute")
    assert_follows(output, calibrated, prompt, slots, served)
    assert (logprobs(output) - exact(live, prompt.token_ids)[2]).abs().max() > 1e-2


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_leaves_the_kv_that_the_reference_engine_leaves(served, calibrated, system):
    policy = policy_of(system, **SYSTEMS[system])
    engine = ReuseEngine(calibrated, policy, MemoryChunkStore(), chunk_size=CHUNK)
    engine.build(FIRST)
    want = engine.prefill(SECOND)
    served.fresh()
    assert receipt(served.one(FIRST, policy=system, **SYSTEMS[system]))["chunks_hit"] == 0
    served.poison()
    output = served.one(SECOND, 1, policy=system, **SYSTEMS[system])
    got = receipt(output)
    for name in ("tokens_reused", "tokens_recomputed", "chunks_hit"):
        assert got[name] == getattr(want.receipt, name), name
    assert got["measured"] and not got["fallback"] and got["tokens_reused"] > 0
    for mine, right in zip(served.left(len(SECOND)), (want.kv.k, want.kv.v), strict=True):
        assert_same(mine, right[:, : len(SECOND)])
    torch.testing.assert_close(logprobs(output), want.logits.log_softmax(-1), **CLOSE)


def test_a_mixed_batch_says_what_each_request_says_alone(served):
    served.fresh()
    served.one(FIRST)
    prompts = [SECOND, turn(4, 20), SECOND, turn(5, 70, 3), FIRST]
    exact = annotations_of(prompts[3], policy="recompute"), annotations_of(FIRST, recompute_ratio=1.0)
    annotations = [annotations_of(SECOND), None, None, *exact]
    alone = []
    for prompt, annotation in zip(prompts, annotations, strict=True):
        served.poison()
        alone.append(served.ask([prompt], [annotation], 6)[0])
    served.poison()
    for got, want in zip(served.ask(prompts, annotations, 6), alone, strict=True):
        assert tokens(got) == tokens(want)
        for i in range(6):
            torch.testing.assert_close(logprobs(got, i), logprobs(want, i), **CLOSE)
    assert receipt(alone[0])["tokens_reused"] > 0 < receipt(alone[4])["tokens_recomputed"]


def test_plain_requests_share_blocks_with_each_other_and_none_behind_a_slot(served, live, calibrated):
    served.fresh()
    first = served.plain(SECOND)
    again = served.plain(SECOND)
    assert again.num_cached_tokens >= len(SECOND) - 2 * BLOCK
    torch.testing.assert_close(logprobs(again), logprobs(first), **CLOSE)
    annotated = served.one(SECOND, policy="recompute")
    # what lies in front of the first slot's end is the same for both
    assert annotated.num_cached_tokens == slots_in(SECOND).bounds[0][1] // BLOCK * BLOCK
    assert_follows(annotated, calibrated, SECOND, slots_in(SECOND))
    served.poison()
    served.one(SECOND, policy="recompute")
    plain = served.plain(SECOND)
    assert 0 < plain.num_cached_tokens <= slots_in(SECOND).bounds[0][1]
    assert_follows(plain, live, SECOND)


def test_what_offsets_do_not_fit_is_computed_with_live_gates(served, live):
    served.fresh()
    longer = Prompt((*turn(6, 20).segments, Segment(random_ids(30, 9), Role.REUSE)))
    output = served.one(longer)
    assert "calibrated for 2" in receipt(output)["fallback"]
    assert_follows(output, live, longer)
    found = served.ask([SECOND], [{"cacheslide": {"find": True}}])[0]
    assert "template" in receipt(found)["fallback"]


def test_a_preempted_request_crosses_its_slots_again(served, calibrated, live):
    served.fresh()
    served.one(FIRST)
    served.poison()
    engine, done = served.llm.llm_engine, []
    asked = {"exact": annotations_of(SECOND, policy="recompute"), "plain": None}
    asked |= {"reused": annotations_of(SECOND, recompute_ratio=1.0)}
    for name, annotations in asked.items():
        extra = None if annotations is None else {"kv_transfer_params": annotations}
        params = SamplingParams(
            max_tokens=16, temperature=0, logprobs=97, detokenize=False, ignore_eos=True, extra_args=extra
        )
        engine.add_request(name, {"prompt_token_ids": list(SECOND.token_ids)}, params)
    for step in range(60):
        if step == 10:
            served.core.scheduler.reset_prefix_cache(reset_running_requests=True)
            served.poison()  # nothing is left of what was computed before
        done += [o for o in engine.step() if o.finished]
    outputs = {o.request_id: o for o in done}
    assert len(outputs) == 3
    for name, output in outputs.items():
        if name == "plain":
            assert_follows(output, live, SECOND)
        else:
            assert_follows(output, calibrated, SECOND, slots_in(SECOND))


@pytest.mark.parametrize("seam", ["_of_batch", "slots"])
def test_slots_that_cannot_be_said_are_crossed_live(served, live, monkeypatch, seam):
    """A fault where the forward asks for them, or where the plan names them: the prompt is computed as unannotated."""
    served.fresh()

    def broken(*args, **kwargs):
        raise RuntimeError("no slots")

    with monkeypatch.context() as patch:
        if seam == "_of_batch":
            patch.setattr(served.worker.model.slot_offsets, "_of_batch", broken)
        else:
            patch.setattr("cacheslide.vllm.scheduler.side.SlotRows", broken)
        output, beside = served.ask([SECOND, FIRST], [annotations_of(SECOND, policy="recompute"), None])
        assert_follows(output, live, SECOND)
        assert_follows(beside, live, FIRST)
        assert receipt(output)["fallback"].startswith("fault at ")
        kept = served.one(FIRST)  # its chunks would not be what their keys say
    assert receipt(kept)["chunks_hit"] == 0 and not len(served.worker.store)
    served.poison()
    assert receipt(served.one(FIRST))["fallback"] == "no chunk of this prompt is in the store"


@pytest.mark.parametrize("recompute_ratio", [None, 1.0])
def test_beams_cross_their_slots(served, calibrated, recompute_ratio):
    """Later requests of a search, whose prompts hold generated rows: all exact, or over reused rows."""
    served.fresh()
    annotations = annotations_of(SECOND, policy="recompute")
    if recompute_ratio is not None:
        served.one(FIRST)
        annotations = annotations_of(SECOND, recompute_ratio=recompute_ratio)
    served.poison()
    params = BeamSearchParams(beam_width=2, max_tokens=5, ignore_eos=True)
    [found] = beam_search(served.llm, [{"prompt_token_ids": list(SECOND.token_ids)}], params, [annotations])
    best, total = found.sequences[0], 0.0
    prompt, slots = list(SECOND.token_ids), slots_in(SECOND)
    assert best.tokens[: len(prompt)] == prompt and len(best.tokens) == len(prompt) + 5
    for i in range(5):
        total += float(exact(calibrated, best.tokens[: len(prompt) + i], slots)[2][best.tokens[len(prompt) + i]])
    assert best.cum_logprob == pytest.approx(total, abs=2e-4)
    assert not served.scheduler.tracked


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="vLLM binds each rank to a core of its own")
def test_two_ranks_are_one(served, path, adapter):
    printed = last_line("tests.helpers.vllm_cope", str(path), str(adapter))
    served.fresh()
    for (their_ids, theirs), (ids, mine) in zip(printed, said(served), strict=True):
        assert their_ids == ids
        torch.testing.assert_close(torch.tensor(theirs), torch.tensor(mine), **CLOSE)
