"""KVComm: offsets against KV written out, what anchors do, and when none is near enough."""

from dataclasses import replace

import pytest
import torch

from baselines.kvcomm import Anchors, fits, policy
from cacheslide import ReuseEngine, load_policy
from cacheslide.core.keys import content_id
from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.core.receipt import Receipt
from cacheslide.core.request_builder import find_pieces
from cacheslide.errors import PolicyError
from cacheslide.policies.none import NoCorrection
from cacheslide.store import DirectoryChunkStore, MemoryChunkStore
from tests.helpers.prompts import dense, isolated, run
from tests.helpers.token_ids import random_ids

NEAR = Anchors(temperature=3.0, gamma=1.0)


def prompt_of(*updated: int) -> Prompt:
    """system | updated ids | two fixed segments | question."""
    fixed = [Segment(random_ids(n, 50 + i), Role.REUSE) for i, n in enumerate((6, 23, 17))]
    parts = fixed[0], Segment(updated, Role.RECOMPUTE), *fixed[1:], Segment(random_ids(5, 9), Role.RECOMPUTE)
    return Prompt(parts)


A, C = random_ids(12, 3), random_ids(12, 5)
B = (*A[:6], *random_ids(6, 4))
MIX = (*A[:11], B[11])  # nearer to A


def served(model, memory, *before, store=None):
    store = MemoryChunkStore() if store is None else store
    engine = ReuseEngine(model, replace(policy(), memory=memory), store, chunk_size=16)
    for one in before:
        engine.build(one)
    return engine


def exact(model, now):
    trace, hidden = dense(model, torch.tensor(now.token_ids), torch.arange(len(now)))
    return trace, model.logits(hidden[-1:])[0]


def test_an_anchor_of_the_same_prefix_gives_the_exact_offset(model):
    """KV of the prompt itself, though every chunk is cached alone."""
    now = prompt_of(*A)
    engine = served(model, Anchors(), now)
    done = engine.prefill(now)
    trace, logits = exact(model, now)
    for layer, (_, k, v) in enumerate(trace):
        torch.testing.assert_close(done.kv.k[layer, : len(now)], k, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(done.kv.v[layer, : len(now)], v, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(done.logits, logits, atol=1e-3, rtol=1e-3)
    receipt = done.receipt
    assert receipt.tokens_reused == 46 and receipt.tokens_per_layer == [17] * model.num_layers and not receipt.fallback


def test_the_same_chunks_without_anchors_are_wrong(model):
    """What the test above would pass with if offsets did nothing."""
    now = prompt_of(*A)
    plain = run(model, isolated(NoCorrection()), now, now)[2]
    assert (plain.logits - exact(model, now)[1]).abs().max() > 1e-2


def test_one_anchor_serves_the_kv_of_the_prompt_it_was_made_in(model):
    before, now = prompt_of(*A), prompt_of(*MIX)
    engine = served(model, Anchors(), before)
    done = engine.prefill(now)
    trace, _ = exact(model, before)
    rows = torch.arange(18, 18 + 40)  # behind updated text of the same length: no key turns
    for layer, (_, k, v) in enumerate(trace):
        torch.testing.assert_close(done.kv.k[layer, rows], k[rows], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(done.kv.v[layer, rows], v[rows], atol=1e-4, rtol=1e-3)
    assert done.receipt.tokens_reused == 46


def test_offsets_follow_their_weights(model):
    """Softmax over distances written out, of two anchors, behind text of another length: keys turn with it."""
    now = prompt_of(*MIX, *C[:4])
    engine = served(model, NEAR, prompt_of(*A))
    memory, plan = engine.policy.memory, engine.plan(now)
    chunk, place = teach(engine, prompt_of(*B), 1), plan.chunks[1]
    assert len(chunk.notes["id"]) == 2
    embed = [model.embed(torch.tensor((*now.token_ids[:6], *x))).mean(0) for x in (A, B, (*MIX, *C[:4]))]
    token = model.embed(torch.tensor(now.token_ids[: place.start])).norm(dim=1).mean()
    distances = torch.stack([place.start * (e - embed[2]).norm() / token for e in embed[:2]])
    weights = memory.weights(model, chunk, now.token_ids[: place.start])
    torch.testing.assert_close(weights, (-distances / 3).softmax(0), atol=1e-5, rtol=1e-4)
    assert weights[0] > weights[1] > 0.05
    found = memory.recall(model, plan, pieces(engine, now))[0]
    want = torch.zeros_like(chunk.k)
    for weight, one in zip(weights, (prompt_of(*A), prompt_of(*B)), strict=True):
        trace, _ = exact(model, one)
        rows = slice(place.start - 4, place.end - 4)
        for layer, (_, k, _) in enumerate(trace):
            back = torch.full((len(place),), -(place.start - 4))
            want[layer] += weight * model.rotaries[layer].rotate(k[rows], back)
    torch.testing.assert_close(found.pieces[1].chunk.k, want, atol=1e-4, rtol=1e-3)
    assert not torch.equal(chunk.k, found.pieces[1].chunk.k)  # the stored chunk stays its base


def teach(engine, one, number):
    """Give a stored chunk an anchor of prompt `one`; the chunk."""
    plan, state = engine.plan(one), ReuseEngine(engine.model, load_policy("recompute"), MemoryChunkStore()).prefill(one)
    chunk = engine.store.get(plan.keys[number])
    notes = engine.policy.memory.learn(engine.model, plan, number, chunk, state.kv)
    assert engine.store.replace(plan.keys[number], replace(chunk, notes=notes))
    return engine.store.get(plan.keys[number])


def pieces(engine, now):
    plan = engine.plan(now)
    return find_pieces(plan.keyed, 0, len(now), lambda _, key, c: engine.store.get(key), Receipt("s", len(now)))


def test_no_anchor_near_enough_is_a_prefill_in_full_which_becomes_one(model):
    memory = Anchors(least=2)  # one anchor is not enough, as in the authors' code
    now = prompt_of(*C)
    engine = served(model, memory, prompt_of(*A))
    done = engine.prefill(now)
    assert done.receipt.compute_fraction == 1.0 and done.receipt.chunks_hit == 0
    assert done.receipt.fallback == "no anchors are near enough to the text before a chunk"
    torch.testing.assert_close(done.logits, exact(model, now)[1], atol=1e-4, rtol=1e-4)
    engine.retain(done, now, 0)
    chunks = [engine.store.get(key) for key in engine.plan(now).keys]
    assert [len(c.notes.get("id", ())) for c in chunks] == [0, 2, 2, 2, 2]
    again = engine.prefill(now)  # its own prefix is known now, and exactly
    torch.testing.assert_close(again.logits, done.logits, atol=1e-3, rtol=1e-3)
    assert again.receipt.tokens_reused == 46
    engine.retain(again, now, 0)  # a request that reused something teaches nothing
    assert all(engine.store.get(k) is c for k, c in zip(engine.plan(now).keys, chunks, strict=True))


def test_text_far_from_every_anchor_and_undecided_weights_prefill_in_full(model):
    table = model.embedding
    here = torch.tensor(A)
    opposite = tuple(int((table @ -table[i]).argmax()) for i in here)  # the tokens that point the other way
    engine = served(model, Anchors(), prompt_of(*A))
    far = Prompt(
        (Segment(opposite, Role.RECOMPUTE), Segment(random_ids(23, 51), Role.REUSE), Segment((1,), "recompute"))
    )
    assert "no anchors" in engine.prefill(far).receipt.fallback
    undecided = served(model, Anchors(temperature=100.0), prompt_of(*A))
    teach(undecided, prompt_of(*B), 1)
    near = prompt_of(*MIX)
    assert "no anchors" in undecided.prefill(near).receipt.fallback  # equal weights have the highest entropy
    decided = served(model, Anchors(temperature=0.01), prompt_of(*A), store=undecided.store)
    assert decided.prefill(near).receipt.tokens_reused == 46


def test_anchors_are_bounded_and_the_oldest_leaves(model):
    engine = served(model, Anchors(most=2), prompt_of(*A))
    for text in (B, C):
        chunk = teach(engine, prompt_of(*text), 1)
    before = prompt_of(*A).token_ids[:6]
    assert chunk.notes["id"].tolist() == [content_id((*before, *text)) for text in (B, C)]
    assert fits(chunk, model.hidden_size) and len(chunk.notes["k"]) == 2 * model.num_layers
    state = ReuseEngine(model, load_policy("recompute"), MemoryChunkStore()).prefill(prompt_of(*C))
    assert engine.policy.memory.learn(model, engine.plan(prompt_of(*C)), 1, chunk, state.kv) is None  # each once


def test_in_a_folder_chunks_keep_the_anchor_they_were_written_with(model, tmp_path):
    now = prompt_of(*A)
    served(model, Anchors(), now, store=DirectoryChunkStore(tmp_path))
    engine = served(model, Anchors(), store=DirectoryChunkStore(tmp_path))
    done = engine.prefill(now)
    torch.testing.assert_close(done.logits, exact(model, now)[1], atol=1e-3, rtol=1e-3)
    assert done.receipt.tokens_reused == 46 and done.receipt.bytes_loaded > 2 * 46 * 4
    strict = served(model, Anchors(least=2), store=engine.store)
    strict.retain(strict.prefill(prompt_of(*C)), prompt_of(*C), 0)
    assert len(engine.store.get(engine.plan(now).keys[1]).notes["id"]) == 1


@pytest.mark.parametrize("damage", ["missing", "shape", "nan", "width", "ids", "eight bits"])
def test_notes_that_are_no_anchors_are_none(model, damage):
    now = prompt_of(*A)
    engine = served(model, Anchors(), now)
    key = engine.plan(now).keys[1]
    chunk = engine.store.get(key)
    notes = dict(chunk.notes)
    if damage == "missing":
        del notes["v"]
    elif damage == "shape":
        notes["k"] = notes["k"][1:]
    elif damage == "nan":
        notes["v"] = notes["v"].clone().fill_(torch.nan)
    elif damage == "width":
        notes["prefix"], notes["id"] = notes["prefix"][:, 1:], notes["id"] + 1
    elif damage == "ids":
        notes["id"] = notes["id"].float()
    else:
        notes["prefix"], notes["id"] = (notes["prefix"] + torch.nan).to(torch.float8_e4m3fn), notes["id"] + 1
    engine.store.replace(key, replace(chunk, notes=notes))
    done = engine.prefill(now)
    assert done.receipt.compute_fraction == 1.0 and "no anchors" in done.receipt.fallback
    engine.retain(done, now, 0)
    torch.testing.assert_close(engine.prefill(now).logits, done.logits, atol=1e-3, rtol=1e-3)
    assert engine.prefill(now).receipt.tokens_reused == 46


def test_a_chunk_of_another_model_is_neither_reused_nor_learned_of(model):
    now = prompt_of(*A)
    engine = served(model, Anchors(), now)
    for key in engine.plan(now).keys:
        chunk = engine.store.get(key)
        engine.store.replace(key, replace(chunk, k=chunk.k[:1], v=chunk.v[:1], notes={}))
    done = engine.prefill(now)
    assert not done.receipt.chunks_hit
    engine.retain(done, now, 0)
    assert not any(engine.store.get(key).notes for key in engine.plan(now).keys)


def test_bad_settings_are_refused():
    for settings, why in (({"least": 0}, "least must lie in"), ({"least": 3, "most": 2}, "least must lie in")):
        with pytest.raises(PolicyError, match=why):
            Anchors(**settings)
    for settings in ({"gamma": 1.1}, {"temperature": 0.0}):
        with pytest.raises(PolicyError, match="gamma must lie in"):
            Anchors(**settings)
    assert load_policy("kvcomm") == policy() and policy().kind == "isolated+anchors" and not policy().copyable
