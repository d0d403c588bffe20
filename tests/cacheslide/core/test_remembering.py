"""Remembered deviation: the score of a token's KV in two contexts, and the chunks that are kept with it."""

from types import SimpleNamespace

import pytest
import torch

from cacheslide.core.encoder import prefill_exact
from cacheslide.core.engine import ReuseEngine
from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.core.remembering import TokenKV, remembered_deviation
from cacheslide.errors import StoreError
from cacheslide.policies.deviation import tokens_of_ratio, top_rows
from cacheslide.policies.encodings import ENCODINGS
from cacheslide.policies.none import NoCorrection
from cacheslide.policies.top_deviation import TopDeviation
from cacheslide.store import MemoryChunkStore
from cacheslide.store.base import ChunkKV
from tests.helpers.checkpoints import save_random, save_random_adapter
from tests.helpers.prompts import prompt
from tests.helpers.remembering import CHUNK, engine_of, policy_of, spoil
from tests.helpers.token_ids import random_ids


def plainly(model, here, reference, turn) -> torch.Tensor:
    """The formula, in float64 and without any of the code under test: `here`, `reference` are (k, v) a layer."""
    total = torch.zeros(len(turn), dtype=torch.float64)
    for layer, ((k, v), (rk, rv)) in enumerate(zip(here, reference, strict=True)):
        inv = torch.atan2(model.rotaries[layer].sin[1].double(), model.rotaries[layer].cos[1].double())
        angle = (turn[:, None].double() * inv)[:, None]
        a, b = rk.double().chunk(2, -1)
        if model.rotates:
            rk = torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)
        for x, r in ((k, rk), (v, rv)):
            total += (x.double() - r.double()).square().mean((1, 2)) / r.double().square().mean()
    return total


def layers_of(model, kv, start: int, end: int):
    return [kv.read(layer, torch.arange(start, end)) for layer in range(model.num_layers)]


def fixed_ids(text: Prompt) -> tuple[int, ...]:
    return sum((s.token_ids for s in text.segments if s.role is Role.REUSE), ())


def expected(model, text: Prompt, plan, encoding: str) -> list[torch.Tensor]:
    """Scores of every chunk of the plan, from dense prefills of both contexts."""
    kv, positions = model.new_kv(len(text)), list(plan.positions)
    engine = ReuseEngine(model, policy_of(correction=NoCorrection()), MemoryChunkStore())
    request = engine.builder.build(text.token_ids, positions, kv)
    engine.executor.run([request])
    chain, at, out = prefill_exact(model, fixed_ids(text)), 0, []
    for chunk in plan.chunks:
        here = layers_of(model, kv, chunk.start, chunk.end)
        where = torch.tensor(positions[chunk.start : chunk.end])
        if encoding in ("in_prompt", "fixed_chain"):
            reference, of = layers_of(model, chain, at, at + len(chunk)), torch.arange(at, at + len(chunk))
        else:
            first = positions[chunk.start] if encoding.endswith("slot") else 0
            alone = prefill_exact(model, text.token_ids[chunk.start : chunk.end], first)
            reference, of = layers_of(model, alone, 0, len(chunk)), torch.arange(first, first + len(chunk))
        out.append(plainly(model, here, reference, where - of))
        at += len(chunk)
    return out


@pytest.mark.parametrize("encoding", list(ENCODINGS))
def test_built_chunks_have_the_scores_of_the_formula(model, encoding):
    text, engine = prompt(9, 3), engine_of(model, encoding)
    assert model.num_kv_heads == 2 < 4  # grouped queries
    assert engine.build(text) > 4
    plan = engine.plan(text)
    got = [engine.store.get(key).scores for key in plan.keys]
    assert {len(c) for c in plan.chunks} > {16}  # chunks of several sizes
    for scores, want in zip(got, expected(model, plan.prompt, plan, encoding), strict=True):
        assert scores.dtype == torch.float32 and scores.device.type == "cpu"
        torch.testing.assert_close(scores.double(), want, atol=1e-5, rtol=1e-4)
    assert max(s.max() for s in got) > 0.1


@pytest.mark.parametrize("encoding", ["in_prompt", "fixed_chain"])
def test_keys_without_positions_are_not_turned(tmp_path, encoding):
    from cacheslide.training.load import load_cope

    base = save_random(tmp_path / "model")
    model = load_cope(base, save_random_adapter(tmp_path / "adapter", base))
    assert not model.rotates
    text, engine = prompt(9, 3), engine_of(model, encoding)
    engine.build(text)
    plan = engine.plan(text)
    for key, want in zip(plan.keys, expected(model, text, plan, encoding), strict=True):
        torch.testing.assert_close(engine.store.get(key).scores.double(), want, atol=1e-5, rtol=1e-4)


def test_a_model_that_does_not_rotate_needs_no_tables(model):
    k, v = torch.randn(2, 4, 7, 2, 10)
    shared = {n: getattr(model, n) for n in ("num_layers", "device", "reduce_scores")} | {"num_layers": 4}
    still = SimpleNamespace(**shared, rotates=False, rotaries=None)
    here, there = (TokenKV(lambda layer: (k[layer], v[layer]), torch.arange(7) + shift) for shift in (40, 0))
    assert torch.equal(remembered_deviation(still, here, there), torch.zeros(7))
    turning = SimpleNamespace(**shared, rotates=True, rotaries=model.rotaries)
    assert float(remembered_deviation(turning, here, there).min()) > 0.1


def test_a_layer_of_zeros_counts_for_nothing(model):
    k, v = torch.randn(2, 5, 7, 2, 10)
    there = TokenKV(lambda layer: (k[layer] * (layer > 1), v[layer]), torch.arange(7))
    here = TokenKV(lambda layer: (k[layer] * (layer > 1), v[layer] + (layer == 3)), torch.arange(7))
    want = 1 / v[3].square().mean()
    torch.testing.assert_close(remembered_deviation(model, here, there), want.expand(7))


def test_text_without_updates_before_it_scores_zero_and_costs_nothing(model):
    text, plain = Prompt(prompt(9, 3).segments[:1]), engine_of(model, correction=NoCorrection())
    engine = engine_of(model)
    plain.build(text), engine.build(text)
    assert engine.encoder.row_layers == plain.encoder.row_layers > 0
    [key] = engine.plan(text).keys
    assert torch.equal(engine.store.get(key).scores, torch.zeros(6))


def test_only_rules_that_ask_pay_for_scores(model):
    for correction in (NoCorrection(), TopDeviation(0.26)):
        engine = engine_of(model, correction=correction)
        engine.build(prompt(9, 3))
        assert all(engine.store.get(key).scores is None for key in engine.plan(prompt(9, 3)).keys)
        assert not engine.policy.needs_scores
    asking = engine_of(model)
    asking.build(prompt(9, 3))
    rows = asking.plan(prompt(9, 3)).chunks[-1].end
    assert asking.encoder.row_layers == (rows + rows - 9) * model.num_layers  # the prompt and the chain


def test_a_chain_that_grew_keeps_its_scores_and_scores_its_tail(model):
    short, long = prompt(9, 3, fixed=(23, 31)), prompt(9, 3)
    engine, fresh = engine_of(model, "fixed_chain"), engine_of(model, "fixed_chain")
    engine.build(short)
    before = {key: engine.store.get(key).scores for key in engine.plan(short).keys}
    engine.build(long), fresh.build(long)
    for key in engine.plan(long).keys:
        torch.testing.assert_close(engine.store.get(key).scores, fresh.store.get(key).scores, atol=1e-5, rtol=1e-4)
        assert key not in before or engine.store.get(key).scores is before[key]


def test_the_token_whose_surroundings_changed_scores_highest(model):
    ids = random_ids(24, 5)
    kv, positions = prefill_exact(model, ids), range(24)
    chunk = ReuseEngine(model, policy_of(), MemoryChunkStore()).encoder.cut(kv, positions, 0, 24)
    changed = prefill_exact(model, (*ids[:14], ids[14] + 1, *ids[15:]))  # what follows it sees another token
    here = TokenKV.of_rows(changed, positions, 0, 24, model.device)
    scores = remembered_deviation(model, here, TokenKV.of_chunk(chunk, model.device))
    assert torch.equal(scores[:14], torch.zeros(14)) and int(scores.argmax()) == 14 and bool((scores[15:] > 0).all())


def test_a_part_of_a_chunk_is_measured_by_all_of_it(model):
    ids, other, positions = random_ids(24, 5), random_ids(24, 6), range(7, 31)
    kv, far = prefill_exact(model, ids), prefill_exact(model, other, 7)
    reference = TokenKV.of_rows(kv, range(24), 0, 24, model.device)
    whole = remembered_deviation(model, TokenKV.of_rows(far, positions, 0, 24, model.device), reference)
    for at in (torch.tensor([3, 4, 17]), torch.tensor([0]), torch.zeros(0, dtype=torch.int64)):
        here = TokenKV(lambda layer, at=at: far.read(layer, at), at + 7)
        got = remembered_deviation(model, here, reference, at)
        torch.testing.assert_close(got, whole[at], atol=1e-6, rtol=1e-5)


def test_ranks_agree_on_the_scores_of_one(model):
    """Two ranks with a KV head each, and sums over both, give what one rank with both heads gives."""
    ids, other = random_ids(13, 5), random_ids(13, 6)
    kv, far, at = prefill_exact(model, ids), prefill_exact(model, other, 4), torch.arange(13)

    def of(heads: slice, model) -> torch.Tensor:
        def cut(kv):
            return lambda layer: tuple(x[:, heads] for x in kv.read(layer, at))

        return remembered_deviation(model, TokenKV(cut(far), at + 4), TokenKV(cut(kv), at))

    sums, shared = [], {n: getattr(model, n) for n in ("num_layers", "rotates", "rotaries", "device")}
    for head in range(2):
        of(slice(head, head + 1), SimpleNamespace(**shared, reduce_scores=lambda x: sums.append(x) or x))
    both = SimpleNamespace(**shared, reduce_scores=lambda x: sums[0] + sums[1])
    assert len(sums) == 2  # one reduction a chunk and rank
    for head in range(2):
        got = of(slice(head, head + 1), both)
        torch.testing.assert_close(got, of(slice(0, 2), model), atol=1e-5, rtol=1e-5)


def test_a_rule_reads_them_also_where_only_a_part_is_reused(model):
    first, engine = prompt(9, 3), engine_of(model, suffix_len=11)  # the suffix reaches into the last chunk
    engine.build(first)
    second = prompt(14, 5)
    state = engine.prefill(second)
    plan = engine.plan(second)
    reused = plan.chunks[-1].end - 14 - 6
    whole = torch.cat([engine.store.get(key).scores for key in plan.keys])
    assert state.receipt.tokens_reused + state.receipt.tokens_recomputed == reused < len(whole)
    rows = torch.cat([torch.arange(c.start, c.end) for c in plan.chunks])[:reused]
    want = rows[top_rows(whole[:reused], tokens_of_ratio(0.25, reused))]
    assert torch.equal(state.output.selected, want) and len(want) > 10


def test_an_exact_copy_has_the_scores_of_an_encoding(model):
    text, engine, built = prompt(9, 3), engine_of(model), engine_of(model)
    state = engine.prefill(text, room=7)
    for layer in range(model.num_layers):
        spoil(state, layer, [*range(6, 15), *range(len(text) - 5, len(text) + 7)])  # of no chunk
    engine.retain(state, text, 0)
    built.build(text)
    rows = engine.plan(text).chunks[-1].end
    assert engine.encoder.row_layers == (rows - 9) * model.num_layers  # the chain alone
    for key in built.plan(text).keys:
        torch.testing.assert_close(engine.store.get(key).scores, built.store.get(key).scores, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("encoding", ["fixed_chain", "isolated"])
def test_retaining_compares_with_the_request_that_was_served(model, encoding):
    text, engine, built = prompt(9, 3), engine_of(model, encoding), engine_of(model, encoding)
    engine.retain(engine.prefill(text), text, 0)
    built.build(text)
    fixed = sum(len(c) for c in engine.plan(text).chunks)
    assert engine.encoder.row_layers == fixed * model.num_layers < built.encoder.row_layers
    for key in built.plan(text).keys:
        torch.testing.assert_close(engine.store.get(key).scores, built.store.get(key).scores, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("encoding", ["fixed_chain", "isolated_at_slot"])
def test_generated_text_is_compared_where_it_was_computed(model, encoding):
    """A schema gives generated text another place than where it was generated: the request is no help then."""
    text, engine, built = prompt(9, 3), engine_of(model, encoding), engine_of(model, encoding)
    state = engine.prefill(text, room=8)
    said = tuple(engine.generate(state, state.logits, 8, frozenset()))
    longer = Prompt((*text.segments, Segment(said[:7], Role.REUSE)))
    assert engine.plan(longer).schema == (encoding == "isolated_at_slot") and state.length >= len(longer)
    engine.retain(state, longer, 0)
    built.build(longer)
    assert (engine.encoder.row_layers < built.encoder.row_layers) == (encoding == "fixed_chain")
    for key in built.plan(longer).keys:
        torch.testing.assert_close(engine.store.get(key).scores, built.store.get(key).scores, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("encoding", ["in_prompt", "fixed_chain"])
def test_chunks_stored_without_scores_get_them_beside_chunks_that_are_encoded(model, encoding):
    store, first, grown = MemoryChunkStore(), prompt(9, 3), prompt(14, 5, fixed=(23, 31, 17, 20))
    plain = ReuseEngine(model, policy_of(encoding, NoCorrection()), store, chunk_size=CHUNK)
    engine = ReuseEngine(model, policy_of(encoding), store, chunk_size=CHUNK)
    scored = engine_of(model, encoding)
    for of in (plain, scored):
        of.build(first)
    wanted, spent = [scored.store.get(key).scores for key in engine.plan(first).keys], scored.encoder.row_layers
    again = prompt(11, 4)
    engine.retain(engine.prefill(again), again, 0)
    held = engine.plan(first).keys
    assert [store.get(key).scores for key in held] == [None] * len(held)  # nothing is encoded: nothing is spent
    before = engine.encoder.row_layers
    retained = engine.retain(engine.prefill(grown), grown, 0)
    cost = engine.encoder.row_layers - before
    assert retained.encoded == 2
    scored.retain(scored.prefill(grown), grown, 0)
    assert cost == scored.encoder.row_layers - spent  # no row more than where they had scores
    for number, (key, want) in enumerate(zip(held, wanted, strict=True)):
        got = store.get(key).scores
        if encoding == "in_prompt":  # the chain is the other context, whatever prompt stands around it
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        assert got.isfinite().all() and bool(got.any()) == (number > 0)


@pytest.mark.parametrize("worst", [float("nan"), float("inf")])
def test_kv_that_is_no_number_has_no_scores(model, worst):
    engine, text = engine_of(model), prompt(9, 3)
    state = engine.prefill(text)
    spoil(state, 2, [20], worst)
    engine.retain(state, text, 0)
    plan = engine.plan(text)
    without = [c.start <= 20 < c.end for c in plan.chunks]
    assert [engine.store.get(key).scores is None for key in plan.keys] == without and sum(without) == 1


def test_scores_that_rank_nothing_make_no_chunk():
    k = torch.zeros(2, 3, 1, 4)
    for scores, why in (
        (torch.zeros(2), "float32"),
        (torch.zeros(3, dtype=torch.float64), "float32"),
        (torch.tensor([0.0, float("nan"), 1.0]), "finite"),
        (torch.tensor([0.0, float("inf"), 1.0]), "finite"),
        (torch.tensor([0.0, -1.0, 1.0]), "at least 0"),
    ):
        with pytest.raises(StoreError, match=why):
            ChunkKV(k, k, torch.arange(3), scores=scores)


def test_segments_behind_each_other_are_one_chain(model):
    """Two updated segments: the chain behind them leaves out both."""
    parts = [Segment(random_ids(n, 40 + n), role) for n, role in ((7, Role.REUSE), (3, Role.RECOMPUTE))]
    text = Prompt((*parts, *prompt(9, 3).segments[1:]))
    engine = engine_of(model)
    engine.build(text)
    plan = engine.plan(text)
    for key, want in zip(plan.keys, expected(model, text, plan, "in_prompt"), strict=True):
        torch.testing.assert_close(engine.store.get(key).scores.double(), want, atol=1e-5, rtol=1e-4)
