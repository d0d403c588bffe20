"""Corrected KV retained as chunks: exact without reuse, counted with it, encoded anew beyond the limit."""

import pytest
import torch

from cacheslide import Prompt, ReuseEngine, Role, Segment, load_policy
from cacheslide.errors import PromptError
from cacheslide.store import MemoryChunkStore
from tests.helpers.prompts import prompt
from tests.helpers.token_ids import random_ids
from tests.helpers.turns import turn


def engine_of(model, name: str) -> ReuseEngine:
    return ReuseEngine(model, load_policy(name), MemoryChunkStore(), chunk_size=16, corrected=MemoryChunkStore())


def serve(engine: ReuseEngine, i: int, limit: int):
    state = engine.prefill(turn(i))
    return state, engine.retain(state, turn(i), limit)


def test_the_first_turn_is_copied_exactly_and_costs_nothing(model):
    retained, built = engine_of(model, "cacheslide_first_turn"), engine_of(model, "cacheslide_first_turn")
    _, did = serve(retained, 2, limit=0)
    chunks = built.build(turn(2))
    assert (did.copied, did.encoded, did.generation) == (chunks, 0, 0) and retained.encoder.row_layers == 0
    assert built.encoder.row_layers > 0
    for key in built.plan(turn(2)).keys:
        torch.testing.assert_close(retained.store.get(key).k, built.store.get(key).k, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(retained.store.get(key).v, built.store.get(key).v, atol=1e-5, rtol=1e-5)


def test_generations_are_counted_and_stop_at_the_limit(model):
    engine, seen, costs = engine_of(model, "naive_reuse"), [], []
    for i in range(6):
        before = engine.encoder.row_layers
        state, did = serve(engine, i, limit=2)
        seen.append((state.receipt.generation, did.generation))
        costs.append(engine.encoder.row_layers - before)
        assert state.receipt.chunks_hit == len(engine.plan(turn(i - 1)).keys) if i else True
    assert seen == [(0, 0), (0, 1), (1, 2), (2, 0), (0, 1), (1, 2)]
    assert [bool(c) for c in costs] == [False, False, False, True, False, False]
    rows = engine.plan(turn(3)).chunks[-1].end
    assert costs[3] == rows * model.num_layers  # the whole prompt up to its last chunk


def test_a_corrected_copy_differs_and_an_exact_one_comes_first(model):
    engine = engine_of(model, "naive_reuse")
    serve(engine, 0, limit=3)
    serve(engine, 1, limit=3)
    new = [k for k in engine.plan(turn(1)).keys if not engine.store.contains(k)]
    assert new and all(engine.corrected.get(k).generation == 1 for k in new)
    exact = engine_of(model, "naive_reuse")
    exact.build(turn(1))
    assert not torch.allclose(engine.corrected.get(new[0]).k[-1], exact.store.get(new[0]).k[-1], atol=1e-3)
    engine.build(turn(1))
    assert engine.prefill(turn(2)).receipt.generation == 0


@pytest.mark.parametrize("name", ["context_cache", "cacheslide", "cacheblend", "cacheslide_promote", "prompt_cache"])
def test_other_encodings_stay_exact(model, name):
    engine = engine_of(model, name)
    for i in range(4):
        state, did = serve(engine, i, limit=1)
        assert (state.receipt.generation, did.generation) == (0, 0) and len(engine.corrected) == 0
    assert bool(engine.encoder.row_layers) is (name != "context_cache")


def test_generated_text_is_retained_for_the_next_turn(model):
    engine = engine_of(model, "cacheslide_first_turn")
    serve(engine, 0, limit=1)
    served = turn(1)
    state = engine.prefill(served, room=9)
    ids = engine.generate(state, state.logits, 9, frozenset())
    said = Segment(tuple(ids[:-1]), Role.REUSE)  # the last token has no KV yet
    did = engine.retain(state, Prompt((*served.segments, said)), limit=1)
    assert did.generation == 1 and did.copied > 0 and did.encoded == 0
    after = Prompt((*turn(2).segments[:4], said, Segment(random_ids(4, 9), Role.RECOMPUTE)))
    key = engine.plan(after).keys[-1]
    assert engine.corrected.get(key).positions.tolist() == list(range(len(served), len(served) + len(ids) - 1))
    too_far = Prompt((*served.segments, Segment(tuple(ids), Role.REUSE)))
    assert engine.retain(state, too_far, limit=9).encoded > 0  # a row without KV is never copied


def test_another_text_than_the_one_served_is_never_copied(model):
    engine = engine_of(model, "naive_reuse")
    state = engine.prefill(turn(1))
    assert engine.retain(state, prompt(8, 999, fixed=(23, 17)), limit=9).encoded > 0
    with pytest.raises(PromptError, match="limit"):
        engine.retain(state, turn(1), limit=-1)


def test_packed_decoding_gives_what_one_by_one_gives(model):
    engine = engine_of(model, "cacheslide")
    engine.build(turn(2))
    prompts = [turn(1), turn(2), turn(3)]
    alone = [engine.generate(s := engine.prefill(p, room=6), s.logits, 6, frozenset()) for p in prompts]
    states = engine.prefill_batch(prompts, room=6)
    said = [[int(s.logits.argmax())] for s in states]
    for _ in range(5):
        for out, logits in zip(said, engine.extend_batch(states, [s[-1:] for s in said]), strict=True):
            out.append(int(logits.argmax()))
    assert said == alone
