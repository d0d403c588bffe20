"""Scores made anew where tokens were recomputed anyway, and chunks encoded anew past a bound."""

from dataclasses import replace

import pytest
import torch

from cacheslide import Prompt, ReuseEngine
from cacheslide.core.placement import Piece
from cacheslide.core.refreshing import refreshed
from cacheslide.core.remembering import TokenKV, remembered_deviation
from cacheslide.core.request_builder import Found
from cacheslide.errors import PromptError, StoreError
from cacheslide.policies.none import NoCorrection
from cacheslide.store import MemoryChunkStore
from cacheslide.store.base import ChunkStore
from tests.helpers.prompts import prompt
from tests.helpers.remembering import CHUNK, engine_of, policy_of, spoil
from tests.helpers.scored import scored
from tests.helpers.tiered import PAGES, key, store
from tests.helpers.turns import turn


def served(engine: ReuseEngine, first: Prompt, second: Prompt):
    engine.build(first)
    return engine.prefill(second), {k: engine.store.get(k) for k in engine.plan(second).keys}


@pytest.mark.parametrize("encoding", ["in_prompt", "fixed_chain", "isolated"])
def test_recomputed_tokens_score_anew_and_the_others_keep_theirs(model, encoding):
    engine, second = engine_of(model, encoding), prompt(14, 5)
    state, before = served(engine, prompt(9, 3), second)
    spent = engine.encoder.row_layers
    plan, selected = engine.plan(second), set(state.output.selected.tolist())
    resting = [r for r in range(len(second)) if r not in selected]
    for layer in range(model.num_layers):
        spoil(state, layer, resting)  # of what was not recomputed nothing is read
    changed = engine.refresh(state)
    assert engine.encoder.row_layers == spent and changed == sum(
        any(r in selected for r in range(c.start, c.end)) for c in plan.chunks
    )
    for k, chunk in plan.keyed:
        new, old = engine.store.get(k), before[k]
        assert torch.equal(new.k, old.k) and torch.equal(new.v, old.v)
        rows = [r for r in range(chunk.start, chunk.end) if r in selected]
        for r in range(chunk.start, chunk.end):
            assert (new.scores[r - chunk.start] == old.scores[r - chunk.start]) == (r not in selected) or (r < 6)
        if rows:
            at, of = torch.tensor(rows), torch.tensor(rows) - chunk.start
            here = TokenKV(lambda layer, at=at: state.kv.read(layer, at), at)
            want = remembered_deviation(model, here, TokenKV.of_chunk(old, model.device), of)
            torch.testing.assert_close(new.scores[of], want)
    again = {k: engine.store.get(k).scores for k in plan.keys}
    assert engine.refresh(state) == changed  # doing it twice changes nothing
    assert all(torch.equal(engine.store.get(k).scores, scores) for k, scores in again.items())


def test_the_bytes_of_a_store_stay_what_they_were(model):
    engine = engine_of(model)
    state, _ = served(engine, prompt(9, 3), prompt(14, 5))
    size, count = engine.store.nbytes, len(engine.store)
    assert engine.refresh(state) > 0 and (engine.store.nbytes, len(engine.store)) == (size, count)


def test_the_same_prompt_again_scores_no_deviation(model):
    engine, text = engine_of(model, correction=replace(policy_of().correction, recompute_ratio=1.0)), prompt(9, 3)
    state, _ = served(engine, text, text)
    assert engine.refresh(state) == len(engine.plan(text).keys)
    worst = max(float(engine.store.get(k).scores.max()) for k in engine.plan(text).keys)
    assert worst < 1e-9


def test_a_part_of_a_chunk_is_refreshed_at_its_place(model):
    engine, second = engine_of(model, suffix_len=11), prompt(14, 5)
    state, before = served(engine, prompt(9, 3), second)
    last, chunk = engine.plan(second).keyed[-2]
    reused = len(second) - 11 - chunk.start
    assert 0 < reused < len(chunk)
    engine.retain(state, second, 0)
    assert torch.equal(engine.store.get(last).scores[reused:], before[last].scores[reused:])
    piece = Piece(before[last], 7, 4)  # rows 4 to 10 of it, as a host with a prefix cache reuses them
    rows = torch.tensor([chunk.start + 4, chunk.start + 6, chunk.start + 11])
    found = Found([piece], [range(chunk.start + 4, chunk.start + 11)])
    [new] = refreshed(model, found, rows, state.kv, range(len(second)))
    changed = (new.scores != before[last].scores).nonzero()[:, 0]
    assert changed.tolist() == [4, 6] and (new.start, new.tokens) == (chunk.start + 4, 2)
    assert new.mean == pytest.approx(float(new.scores[changed].mean()))


def test_rows_have_the_scores_of_the_pieces_they_were_reused_from():
    one, two = scored(1), scored(2, n=20)
    found = Found([Piece(one, 30, 10), Piece(two, 20)], [range(5, 35), range(35, 55)])
    want = torch.cat([one.scores[10:], two.scores])
    for start, end in ((5, 55), (5, 6), (12, 40), (34, 36), (54, 55)):
        assert torch.equal(found.scores_of(start, end), want[start - 5 : end - 5])
    for start, end in ((4, 6), (54, 56), (0, 60), (60, 61)):
        assert found.scores_of(start, end) is None
    assert Found([Piece(replace(one, scores=None), 30)], [range(30)]).scores_of(0, 3) is None


def test_without_scores_there_is_nothing_to_refresh(model):
    plain = engine_of(model, correction=NoCorrection())
    state, _ = served(plain, prompt(9, 3), prompt(14, 5))
    assert state.found is None and plain.refresh(state) == 0
    kept = plain.store  # chunks of a rule that needs none, under a rule that does
    engine = ReuseEngine(model, policy_of(), kept, chunk_size=CHUNK)
    state = engine.prefill(prompt(14, 5))
    assert state.receipt.chunks_hit > 3 and engine.refresh(state) == 0
    exact = ReuseEngine(model, policy_of(), MemoryChunkStore(), chunk_size=CHUNK).prefill(prompt(14, 5))
    assert engine.refresh(exact) == 0


def test_fresh_kv_that_is_no_number_changes_no_score(model):
    engine, second = engine_of(model), prompt(14, 5)
    state, before = served(engine, prompt(9, 3), second)
    spoil(state, 1, state.output.selected.tolist())
    assert engine.refresh(state) == 0
    assert all(engine.store.get(k) is before[k] for k in before)


def test_past_the_bound_a_chunk_is_encoded_anew_in_this_prompt(model):
    """Which chunks are past it is the refreshed mean; they become what an empty store would get from this prompt."""
    first, second = prompt(9, 3), prompt(14, 5)
    probe = engine_of(model)
    state, _ = served(probe, first, second)
    probe.refresh(state)
    plan, selected = probe.plan(second), set(state.output.selected.tolist())
    means = {}
    for k, chunk in plan.keyed:
        rows = [r - chunk.start for r in range(chunk.start, chunk.end) if r in selected]
        if rows:
            means[k] = float(probe.store.get(k).scores[rows].mean())
    bound = sorted(means.values())[len(means) // 2]
    past = {k for k, mean in means.items() if mean > bound}
    assert past and past != set(means)

    engine, fresh = engine_of(model, max_deviation=bound), engine_of(model)
    state, before = served(engine, first, second)
    did = engine.retain(state, second, 0)
    fresh.build(second)
    assert (did.encoded, did.copied, did.refreshed) == (len(past), 0, len(means))
    for k in plan.keys:
        got, want = engine.store.get(k), fresh.store.get(k) if k in past else before[k]
        torch.testing.assert_close(got.k, want.k)
        torch.testing.assert_close(got.v, want.v)
        if k in past:
            torch.testing.assert_close(got.scores, want.scores, atol=1e-5, rtol=1e-4)
            assert not torch.allclose(got.v, before[k].v, atol=1e-3)
    assert len(engine.store) == len(plan.keys) == len(fresh.store)


def test_by_default_no_bound_is_passed_and_canonical_chunks_stay(model):
    for options, encoding in (({}, "in_prompt"), ({"max_deviation": 0.0}, "fixed_chain")):
        engine, second = engine_of(model, encoding, **options), prompt(14, 5)
        state, before = served(engine, prompt(9, 3), second)
        did = engine.retain(state, second, 0)
        assert did.encoded == 0 and did.refreshed > 0
        assert all(torch.equal(engine.store.get(k).k, chunk.k) for k, chunk in before.items())


@pytest.mark.parametrize("bound", [-1.0, float("nan")])
def test_a_bound_that_is_none_is_refused(model, bound):
    with pytest.raises(PromptError, match="max_deviation"):
        engine_of(model, max_deviation=bound)


def test_corrected_copies_are_refreshed_where_they_lie(model):
    """A growing history: what is copied over reused rows has no scores, what was exact has, and both serve on."""
    engine = engine_of(model, corrected=MemoryChunkStore())
    for i in range(3):
        did = engine.retain(engine.prefill(turn(i)), turn(i), 3)
    assert did.generation == 2 and len(engine.corrected) > 0
    assert all(engine.corrected.get(k).scores is None for k in list(engine.corrected._chunks))
    assert all(engine.store.get(k).scores is not None for k in list(engine.store._chunks))


def test_a_corrected_copy_carries_on_the_scores_of_what_it_was_reused_from(model):
    engine = engine_of(model, corrected=MemoryChunkStore())
    state, before = served(engine, prompt(9, 3), prompt(14, 5))
    for k in before:
        del engine.store._chunks[k]  # it has left the store since it was read
    did = engine.retain(state, prompt(14, 5), 1)
    assert (did.copied, did.generation, did.refreshed) == (len(before), 1, 0)
    for k, old in before.items():
        assert torch.equal(engine.corrected.get(k).scores, old.scores)
    engine.refresh(again := engine.prefill(prompt(11, 7)))
    changed = [not torch.equal(engine.corrected.get(k).scores, old.scores) for k, old in before.items()]
    assert again.receipt.generation == 1 and any(changed) and not len(engine.store)


def test_tiers_give_new_scores_to_what_is_in_memory(tmp_path):
    s = store(tmp_path, host=3 * PAGES)
    s.put(key(1), scored(1))
    new = scored(2).scores
    assert s.rescore(key(1), new) and not s.rescore(key(9), new)
    assert torch.equal(s.get(key(1)).scores, new)
    for wrong in (new[:-1], new.double(), new - 20, new * torch.nan):
        with pytest.raises(StoreError):
            s.rescore(key(1), wrong)
    new.zero_()  # the store's are its own
    assert float(s.get(key(1)).scores.max()) > 0
    assert s.flush(60) and s.close()


def test_stores_that_write_once_keep_what_they_have(tmp_path):
    s = store(tmp_path, host=3 * PAGES)
    s.put(key(1), scored(1))
    assert not s.replace(key(1), scored(2)) and torch.equal(s.get(key(1)).k, scored(1).k)
    assert s.close()
    memory = MemoryChunkStore(2 * scored(1).nbytes)
    memory.put("a", scored(1))
    assert memory.replace("a", scored(2)) and not memory.replace("b", scored(2))
    assert torch.equal(memory.get("a").k, scored(2).k) and memory.nbytes == scored(2).nbytes
    assert not memory.replace("a", scored(3, n=4000)) and torch.equal(memory.get("a").k, scored(2).k)
    memory.put("b", scored(3))
    assert memory.rescore("a", scored(5).scores) and torch.equal(memory.get("a").scores, scored(5).scores)
    assert {ChunkStore.rescore, ChunkStore.replace}.isdisjoint({MemoryChunkStore.rescore, MemoryChunkStore.replace})


def test_a_chunk_that_was_encoded_anew_meanwhile_keeps_its_own_scores(model):
    """Two requests served from one chunk: the second's KV was compared with what the first has replaced since."""
    engine, first, second = engine_of(model, max_deviation=0.0), prompt(14, 5), prompt(11, 7)
    engine.build(prompt(9, 3))
    one, two = engine.prefill_batch([first, second])
    assert engine.retain(one, first, 0).encoded > 0
    anew = {k: engine.store.get(k) for k in engine.plan(first).keys}
    assert engine.refresh(two) < len(anew)
    for k, chunk in anew.items():
        if int(chunk.positions[0]) > 6:  # behind the updated text: encoded in `first`
            assert torch.equal(engine.store.get(k).scores, chunk.scores)
