"""Cache-Craft: its equations against numbers and loops written out, and what it recomputes of a prompt."""

import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch

from baselines.cache_craft import (
    CacheFix,
    context_impact,
    fits,
    fix_overhead,
    order_penalty,
    policy,
    prefix_overlap,
)
from cacheslide import ReuseEngine, load_policy
from cacheslide.core.keys import content_id
from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.core.reused import ReusedTokens
from cacheslide.errors import PolicyError
from cacheslide.models.reference import ReferenceDecoder
from cacheslide.store import DirectoryChunkStore, MemoryChunkStore
from tests.helpers.families import save_family
from tests.helpers.prompts import dense, oracle, placed_cache, prompt, run
from tests.helpers.token_ids import random_ids

BEFORE, NOW = prompt(7, 3), prompt(13, 5)
TEXTS = [random_ids(n, 60 + n) for n in (9, 11, 13)]


def fixed(*order: int, question: int = 5, seed: int = 8) -> Prompt:
    """A head, texts in this order, a question."""
    parts = [Segment(random_ids(6, 0), Role.REUSE), *(Segment(TEXTS[i], Role.REUSE) for i in order)]
    return Prompt((*parts, Segment(random_ids(question, seed), Role.RECOMPUTE)))


def notes(token=(0.5, 0.25, 0.0, 1.0), inter=(0.25, 1.5), intra=2.25, length=(2, 5), ids=(11, 12)):
    real = {"token": torch.tensor(token), "inter": torch.tensor(inter), "intra": torch.tensor([intra])}
    return real | {name: torch.tensor(x, dtype=torch.int64) for name, x in (("length", length), ("id", ids))}


@pytest.fixture(scope="module", params=["llama", "gemma3-one-kv-head", "qwen3-windows"])
def decoder(request, tmp_path_factory) -> ReferenceDecoder:
    return ReferenceDecoder.from_pretrained(save_family(tmp_path_factory.mktemp("model"), request.param))


def test_notes_are_the_attention_of_the_prompt(decoder):
    engine = ReuseEngine(decoder, policy(), MemoryChunkStore(), chunk_size=16)
    engine.build(BEFORE)
    plan, want = engine.plan(BEFORE), attention_of(decoder, BEFORE)
    spans = [(0, 6), (6, 13), (13, 29), (29, 36), (36, 52), (52, 67), (67, 83), (83, 84)]
    assert [(c.start, c.end) for c in plan.chunks] == [spans[0], *spans[2:]]
    for key, chunk in plan.keyed:
        got, before = engine.store.get(key).notes, [s for s in spans if s[1] <= chunk.start]
        rows = want[chunk.start : chunk.end]
        assert fits(got, len(chunk)) and got["length"].tolist() == [b - a for a, b in before]
        assert got["id"].tolist() == [content_id(BEFORE.token_ids[a:b]) for a, b in before]
        inter = torch.tensor([rows[:, a:b].sum() for a, b in before])
        torch.testing.assert_close(got["inter"], inter, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got["token"], rows[:, : chunk.start].sum(1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got["intra"][0], rows[:, chunk.start : chunk.end].sum(), atol=1e-4, rtol=1e-4)


def attention_of(model, now):
    """Mean over layers and heads of the attention of each row to each, [rows, rows], softmax written out."""
    ids, where = torch.tensor(now.token_ids), torch.arange(len(now))
    exact = ReuseEngine(model, load_policy("recompute"), MemoryChunkStore()).prefill(now).kv
    hidden, total = model.embed(ids), torch.zeros(len(now), len(now))
    for layer in range(model.num_layers):
        q = model.qkv(layer, hidden, where)[0]
        keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in exact.read(layer, where))
        logits = torch.einsum("qhd,khd->hqk", q, keys) * (model.config.attention_scale or model.head_dim**-0.5)
        apart, window = where[:, None] - where, model.config.windows[layer] or len(now)
        weights = logits.masked_fill((apart < 0) | (apart >= window), float("-inf")).softmax(-1)
        total += weights.mean(0) / model.num_layers
        hidden = model.finish(layer, hidden, torch.einsum("hqk,khd->qhd", weights, values))
    return total


def test_the_papers_numbers_by_hand():
    """a = (0.25/2 + 1.5/5) / 4, b = 2.25 / 16, CCI = 1 / (1 + exp(-a/b))."""
    impact = 1 / (1 + math.exp(-(0.425 / 4) / (2.25 / 16)))
    assert context_impact(notes()) == pytest.approx(impact)
    assert prefix_overlap(notes(), [11, 12]) == 1.0 and prefix_overlap(notes(), []) == 0.0
    assert prefix_overlap(notes(), [12]) == pytest.approx(1.5 / 1.75)
    assert prefix_overlap(notes(), [7, 12, 11]) == 0.0  # all there, in the other order
    assert fix_overhead(notes(), [12, 9], 0.5) == pytest.approx(0.5 * impact * (1 - 1.5 / 1.75))
    assert fix_overhead(notes(), [], 3.0) == 1.0 and fix_overhead(notes(), [11, 12], 3.0) == 0.0
    nothing = notes(inter=(), length=(), ids=())
    assert context_impact(nothing) == 0.5 and prefix_overlap(nothing, [5]) == 1.0
    assert context_impact(notes(intra=0.0)) == 1.0 and context_impact(notes(inter=(0.0, 0.0), intra=0.0)) == 0.5


@pytest.mark.parametrize("name", ["token", "inter", "intra"])
def test_notes_of_eight_bits_are_read(name):
    """A folder's file may hold them, and torch knows no `isfinite` of them."""
    made = notes()
    assert fits(made | {name: made[name].to(torch.float8_e4m3fn)}, 4)
    assert not fits(made | {name: (made[name] + torch.nan).to(torch.float8_e4m3fn)}, 4)


def test_order_penalty_is_kendalls_distance():
    for new in permutations(range(4)):
        swaps = sum(new.index(a) > new.index(b) for a in range(4) for b in range(a + 1, 4))
        assert order_penalty(range(4), new) == swaps / 6
    assert order_penalty([1, 2, 3], [3, 9, 1]) == 1.0 and order_penalty([1, 2], [2]) == 0.0
    assert order_penalty([1, 2, 1], [1, 2, 2, 1]) == 0.0  # the first of equal texts counts


def test_a_share_of_each_chunk_is_recomputed_those_first_that_attend_most_to_others():
    ids = tuple(range(40))
    head = notes(token=(0.0,) * 3, inter=(), length=(), ids=())
    own = notes(ids=(content_id(ids[:3]), 12))
    reused = ReusedTokens((0, 9), (3, 4), token_ids=ids, notes=(head, own))
    share = context_impact(own) * (1 - 0.25 / 1.75)
    assert math.ceil(share * 4) == 3
    want = [False, False, False, True, True, False, True]
    assert CacheFix().known_before_start(reused).tolist() == want
    half = CacheFix(recompute_ratio=0.5).known_before_start(reused).tolist()
    assert half == [True, True, False, True, False, False, True]
    assert CacheFix(0.01).known_before_start(reused).tolist() == [False] * 6 + [True]  # rounded up
    cut = replace(reused, lengths=(3, 2))  # a chunk that is reused in part
    assert CacheFix().known_before_start(cut).tolist() == want[:5]
    nan, short, more = {"intra": torch.tensor([math.nan])}, {"token": torch.zeros(3)}, {"x": head["id"]}
    for broken in ({}, own | nan, own | short, own | more):
        lacking = replace(reused, notes=(head, broken))
        assert CacheFix().known_before_start(lacking).tolist() == [False] * 3 + [True] * 4
    assert CacheFix().known_before_start(replace(reused, notes=())).all()
    assert CacheFix().known_before_start(ReusedTokens()).tolist() == []


def test_the_same_prompt_again_recomputes_nothing(model):
    _, _, done = run(model, policy(), BEFORE, BEFORE)
    assert done.receipt.tokens_recomputed == 0 and done.receipt.tokens_reused == 77
    _, hidden = dense(model, torch.tensor(BEFORE.token_ids), torch.arange(len(BEFORE)))
    torch.testing.assert_close(done.logits, model.logits(hidden[-1:])[0], atol=1e-4, rtol=1e-4)


def test_everything_recomputed_is_recompute(decoder):
    _, hidden = dense(decoder, torch.tensor(NOW.token_ids), torch.arange(len(NOW)))
    _, _, done = run(decoder, policy().at_ratio(1.0), BEFORE, NOW)
    torch.testing.assert_close(done.logits, decoder.logits(hidden[-1:])[0], atol=1e-4, rtol=1e-4)
    assert done.receipt.tokens_reused == 0 and done.receipt.chunks_hit > 3


def test_equals_the_dense_forward_with_overwritten_rows(decoder):
    _, request, done = run(decoder, policy(), BEFORE, NOW)
    chosen = torch.isin(request.reused, done.output.selected)
    index = (~chosen).nonzero()[:, 0]
    placed = placed_cache(decoder, request, index)
    kv, logits = oracle(decoder, request.token_ids, request.positions, 0, request.reused[index], placed)
    torch.testing.assert_close(done.kv.k[:, : len(NOW)], kv.k, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(done.logits, logits, atol=1e-4, rtol=1e-4)
    assert 0 < len(done.output.selected) < len(request.reused)


def test_texts_in_another_order_are_fixed_more_than_in_the_same(model):
    def recomputed(*order):
        return run(model, policy(), fixed(0, 1, 2), fixed(*order, seed=9))[2].receipt.tokens_recomputed

    assert recomputed(0, 1, 2) == 0 < recomputed(0, 2, 1) < recomputed(2, 1, 0)
    alone = run(model, policy(), fixed(0, 1, 2), fixed(2))[2].receipt
    assert alone.chunks_hit == 2 and 0 < alone.tokens_recomputed < 13  # its other texts are gone


def test_cached_kv_of_a_recomputed_token_reaches_nothing(model):
    engine, request, clean = run(model, policy(), BEFORE, NOW)
    at = torch.isin(request.reused, clean.output.selected).split([p.length for p in request.source.pieces])
    for piece, poisoned in zip(request.source.pieces, at, strict=True):
        piece.chunk.k[:, piece.rows][:, poisoned] = float("nan")
        piece.chunk.v[:, piece.rows][:, poisoned] = float("nan")
    assert torch.equal(engine.prefill(NOW).logits, clean.logits) and len(clean.output.selected) > 3
    request.source.pieces[0].chunk.v.fill_(float("nan"))  # the head, behind nothing, stays as it is
    assert engine.prefill(NOW).logits.isnan().all()


def test_notes_outlive_a_process_in_a_folder(model, tmp_path):
    ReuseEngine(model, policy(), DirectoryChunkStore(tmp_path), chunk_size=16).build(BEFORE)
    done = ReuseEngine(model, policy(), DirectoryChunkStore(tmp_path), chunk_size=16).prefill(NOW)
    _, _, want = run(model, policy(), BEFORE, NOW)
    assert torch.equal(done.output.selected, want.output.selected) and torch.equal(done.logits, want.logits)


def test_the_system_as_it_is_registered():
    assert load_policy("cache_craft") == policy() and policy().kind == "any_prompt+attention"
    assert not policy().copyable and policy().correction.total_ratio is None
    assert policy().at_ratio(0.3).correction == CacheFix(recompute_ratio=0.3)
    refused = ({"alpha": 0.0}, "alpha must be"), ({"recompute_ratio": 2.0}, r"must lie in \[0, 1\], not 2")
    for settings, why in refused:
        with pytest.raises(PolicyError, match=why):
            CacheFix(**settings)
