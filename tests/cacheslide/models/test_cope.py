"""The reference model with CoPE, the engine over it, and CCPE calibration."""

from dataclasses import replace
from random import Random

import pytest
import torch
from safetensors.torch import save_file

from cacheslide.core.encoder import ChunkEncoder
from cacheslide.core.engine import ReuseEngine
from cacheslide.core.keys import FixedChainKeying
from cacheslide.core.placement import Placement
from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.errors import ModelError, PromptError
from cacheslide.models.reference import ReferenceDecoder
from cacheslide.policies.base import ReusePolicy
from cacheslide.policies.encodings import ENCODINGS, Isolated
from cacheslide.policies.top_deviation import TopDeviation
from cacheslide.positions.ccpe import slots_between, slots_in
from cacheslide.positions.cope import scores_and_gates
from cacheslide.store import MemoryChunkStore
from cacheslide.training import calibration as ccpe
from cacheslide.training.adapter import save_adapter
from cacheslide.training.load import load_cope
from tests.helpers.checkpoints import SHAPE, save_random_adapter
from tests.helpers.dense_cope import dense
from tests.helpers.token_ids import random_ids

LAYERS, HEADS, DIM, WIDTH = (SHAPE[k] for k in ("num_hidden_layers", "num_attention_heads", "head_dim", "hidden_size"))


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """A folder with a random adapter of `checkpoint`."""
    return save_random_adapter(tmp_path_factory.mktemp("adapter"), checkpoint)


@pytest.fixture(scope="module")
def live(checkpoint, adapter):
    return load_cope(checkpoint, adapter, live=True)


def with_offsets(model, offsets):
    """The same model with slot offsets."""
    out = object.__new__(type(model))
    out.__dict__ |= model.__dict__ | {"slot_offsets": offsets, "model_id": model.model_id + "slot_offsets"}
    return out


def prompt(turn: int, notes: int, tail: int = 5) -> Prompt:
    """System text, notes that change, a document, a remark that changes, a second document, a question."""
    fixed = [random_ids(12, 1), random_ids(30, 2), random_ids(25, 3)]
    changing = [random_ids(notes, 100 + turn), random_ids(3 + turn % 4, 200 + turn), random_ids(tail, 300 + turn)]
    parts = [(fixed[0], Role.REUSE), (changing[0], Role.RECOMPUTE), (fixed[1], Role.REUSE)]
    parts += [(changing[1], Role.RECOMPUTE), (fixed[2], Role.REUSE), (changing[2], Role.RECOMPUTE)]
    return Prompt(tuple(Segment(ids, role) for ids, role in parts))


def test_it_computes_what_the_hugging_face_stack_computes(checkpoint, adapter, live):
    pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from cacheslide.training.adapter import load_adapter
    from cacheslide.training.attach import CopeStack

    found = load_adapter(adapter, checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    CopeStack(model, found.settings).load(found)
    ids = random_ids(50, 9)
    want = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(live.logits(dense(live, ids)[0][-1]), want, rtol=1e-4, atol=1e-4)
    plain = ReferenceDecoder.from_pretrained(checkpoint)
    assert not torch.allclose(plain.logits(dense(plain, ids)[0][-1]), want, atol=1e-2)


def test_where_a_prompts_slots_lie():
    p = Prompt((Segment((5,), Role.RECOMPUTE), Segment((6,), Role.RECOMPUTE), *prompt(0, 7).segments))
    slots = slots_in(p)
    assert slots.bounds == ((0, 2), (14, 21), (51, 54)) and slots.canonical.sum() == 67
    assert all(slots.canonical[a:b].sum() == 0 for a, b in slots.bounds) and len(slots.canonical) == len(p)
    chain = slots_between(p)
    assert chain.bounds == ((0, 0), (12, 12), (42, 42)) and chain.canonical.all() and len(chain.canonical) == 67


def policy(correction=None, kind="fixed_chain") -> ReusePolicy:
    """CacheSlide on a CoPE model: keys stay as they are stored."""
    given = {"correction": correction} if correction else {}
    return ReusePolicy("cope", "", FixedChainKeying(), ENCODINGS[kind], Placement("stored"), **given)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fixed_chain", "in_prompt"])
@pytest.mark.parametrize("gamma", [False, True])
def test_a_hundred_shifted_turns_reuse_every_reusable_row(live, kind, gamma):
    model = with_offsets(live, torch.full((LAYERS, 2, HEADS), 2.5)) if gamma else live
    engine, rng = ReuseEngine(model, policy(kind=kind), MemoryChunkStore(), chunk_size=16), Random(0)
    engine.build(prompt(0, 9))
    reusable = reused = 0
    for turn in range(1, 101):
        receipt = engine.prefill(prompt(turn, rng.randrange(1, 60))).receipt
        assert not receipt.fallback
        reusable, reused = reusable + 67, reused + receipt.tokens_reused
    assert reused / reusable >= 0.99


def test_recomputing_every_reused_row_is_plain_recompute(live):
    """Also with offsets: the same rows cross the same slots by the same Γ in both."""
    for model in (live, with_offsets(live, torch.rand(LAYERS, 2, HEADS) * 4)):
        engine = ReuseEngine(model, policy(TopDeviation(1.0, layer=2)), MemoryChunkStore(), chunk_size=16)
        engine.build(prompt(0, 9))
        now = prompt(1, 21)
        hidden, kv = dense(model, now, slots_in(now))
        done = engine.prefill(now)
        torch.testing.assert_close(done.logits, model.logits(hidden[-1])[-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(done.kv.k[:, : len(now)], kv.k, rtol=1e-4, atol=1e-4)


def test_offsets_change_fixed_chunks_alone_and_the_chain_is_encoded_with_them(live):
    model, now = with_offsets(live, torch.full((LAYERS, 2, HEADS), 3.0)), prompt(1, 21)
    slots = slots_in(now)
    one, two = dense(live, now)[0][1], dense(model, now, slots)[0][1]
    changed = (one - two).abs().amax(1) > 1e-6  # behind the first layer
    behind = slots.canonical & (torch.arange(len(now)) >= slots.bounds[0][1])
    assert changed.any() and not (changed & ~behind).any() and changed[slots.bounds[0][1]]
    store = MemoryChunkStore()
    engine = ReuseEngine(model, policy(), store, chunk_size=16)
    plan = engine.plan(now)
    assert engine.build(now) == len(plan.keys)
    chain = tuple(t for s in now.segments if s.role is Role.REUSE for t in s.token_ids)
    want = dense(model, chain, slots_between(now))[1].k
    got = torch.cat([store.get(key).k for key in plan.keys], dim=1)
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got, dense(live, chain)[1].k, atol=1e-4)


def test_a_prompt_with_more_slots_than_were_calibrated_is_refused(live):
    model = with_offsets(live, torch.ones(LAYERS, 1, HEADS))
    with pytest.raises(PromptError, match="calibrated for 1"):
        ReuseEngine(model, policy(), MemoryChunkStore()).prefill(prompt(1, 5))


def test_the_mode_of_a_histogram():
    assert ccpe.mode(torch.tensor([0.1, 1.1, 1.3, 7.0]), 0.5) == pytest.approx(1.2)
    assert ccpe.mode(torch.tensor([0.1, 7.1]), 0.5) == pytest.approx(0.1)
    assert ccpe.mode(torch.tensor([]), 0.5) == 0.0


def test_calibration_reads_the_gates_of_unsaturated_queries(live):
    prompts = [prompt(i, 4 + i) for i in range(3)]
    offsets, samples = ccpe.calibrate(live, prompts, 2, bin_width=0.25)
    values, p_max = [], live.tables[0].shape[0]
    for p in prompts:
        slots, rows = slots_in(p), torch.arange(len(p))
        q, k, _ = live.qkv(0, live.embed(torch.tensor(p.token_ids)), rows)
        _, gates = scores_and_gates(q, k, rows, None)
        first, end = slots.bounds[1]
        for row in rows[slots.canonical & (rows >= end)].tolist():
            if gates[2, row, end:].sum() < p_max - 1:
                values.append(float(gates[2, row, first:end].sum()))
    want = ccpe.mode(torch.tensor(values), 0.25)
    assert float(offsets[0, 1, 2]) == pytest.approx(want, rel=1e-4) and offsets.shape == (LAYERS, 2, HEADS)
    share = samples.unsaturated_share()
    assert 0 < float(share[0, 1, 2]) < 1 and float(share[0, 1, 2]) == pytest.approx(len(values) / 75)
    with pytest.raises(ModelError, match="live"):
        ccpe.calibrate(with_offsets(live, offsets), prompts, 2)


def test_a_calibration_is_bound_to_its_adapter(checkpoint, adapter, live, tmp_path):
    from cacheslide.training.adapter import load_adapter

    found = load_adapter(adapter)
    save_adapter(found, tmp_path)
    made = ccpe.Calibration(torch.rand(LAYERS, 2, HEADS), found.digest, ccpe.template_id(["a", "b"]), 0.5, {"n": 3})
    ccpe.save_calibration(made, tmp_path)
    assert ccpe.find_calibration(tmp_path, found.digest).digest == made.digest
    model = load_cope(checkpoint, tmp_path)
    assert torch.equal(model.slot_offsets, made.slot_offsets)
    ids = {model.model_id, live.model_id, load_cope(checkpoint, tmp_path, cap=True).model_id}
    assert len(ids) == 3 and load_cope(checkpoint, tmp_path, live=True).model_id == live.model_id
    with pytest.raises(ModelError, match="another adapter"):
        ccpe.find_calibration(tmp_path, "other")
    ccpe.save_calibration(replace(made, slot_offsets=torch.rand(LAYERS, 1, HEADS)), tmp_path / "b")
    save_file({"slot_offsets": made.slot_offsets + 1}, tmp_path / "b" / ccpe.FILES[0])
    with pytest.raises(ModelError, match="altered"):
        ccpe.find_calibration(tmp_path / "b", found.digest)
    assert ccpe.find_calibration(tmp_path / "nothing", "x") is None


def test_the_encoder_needs_no_slots_of_chunks_encoded_alone(live):
    engine = ReuseEngine(with_offsets(live, torch.ones(LAYERS, 2, HEADS)), policy(), MemoryChunkStore())
    assert isinstance(engine.encoder, ChunkEncoder)
    p = prompt(1, 5)
    plan = engine.plan(p)
    keys = tuple(f"alone{i}" for i in range(len(plan.chunks)))
    assert engine.encoder.encode(Isolated(), replace(plan, keys=keys)) == len(keys)
