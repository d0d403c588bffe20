"""CacheBlend's sets that narrow with depth: how many tokens, which ones, and what KV they leave."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from baselines.gradual_filtering import GradualFiltering
from cacheslide.core.engine import ReuseEngine
from cacheslide.errors import PolicyError
from cacheslide.models.adapter import RowGroup
from cacheslide.policies.deviation import deviation, tokens_of_ratio, top_rows
from cacheslide.policies.registry import load_policy
from cacheslide.policies.top_deviation import TopDeviation
from cacheslide.store import MemoryChunkStore
from tests.helpers.prompts import chain, dense, isolated, oracle, placed_cache, prompt, run

BEFORE, NOW = prompt(7, 3), prompt(13, 5)
RULES = [
    GradualFiltering(0.3),
    GradualFiltering(0.4, spread=0.9),
    GradualFiltering(0.3, layer=2, spread=0.5, metric="kv"),
    GradualFiltering(0.3, spread=0.8, steps=2, metric="k"),
    GradualFiltering(0.3, layer=4),
]


@pytest.mark.parametrize("layers", [2, 5, 28])
@pytest.mark.parametrize("steps", [None, 1, 2, 3, 100])
@pytest.mark.parametrize("ratio", [0.0, 0.18, 0.95, 1.0])
def test_the_mean_over_layers_is_the_stated_ratio(layers, steps, ratio):
    rule = GradualFiltering(ratio, layer=1, spread=0.5, steps=steps)
    ratios = rule.ratios(layers)
    assert len(ratios) == layers - 1 and sum(ratios) / len(ratios) == pytest.approx(ratio)
    assert all(0 <= b <= a <= 1 + 1e-12 for a, b in pairwise(ratios))
    assert len({round(x, 9) for x in ratios}) == (1 if ratio in (0, 1) else min(steps or layers, layers - 1))
    if steps is None and ratio == 0.18 and layers > 2:
        assert ratios[0] == pytest.approx(0.27) and ratios[-1] == pytest.approx(0.09)


@pytest.mark.parametrize("layers", [5, 7, 28])
@pytest.mark.parametrize("steps", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_no_layer_recomputes_more_tokens_than_the_one_before(layers, steps, spread):
    """Also where a share lies between two counts, which rounding errors of a mean would tell apart."""
    for ratio in (0.1, 0.3, 0.7, 0.9):
        for reused in (5, 50, 12345):
            counts = GradualFiltering(ratio, 0, spread, steps).counts(layers, reused)
            assert all(a >= b for a, b in pairwise(counts))
            assert spread or counts == [tokens_of_ratio(ratio, reused)] * layers


def narrowed(model, request, rule):
    """Plainly: a dense forward in which ever more rows have placed K/V, each from the layer behind its last fresh one.

    K and V of all rows, logits, rows whose attention is computed in each layer, the last set.
    """
    reused, n = request.reused, len(request.token_ids)
    placed, counts = placed_cache(model, request, torch.arange(len(reused))), []
    rows, kv, hidden = torch.arange(n), model.new_kv(n), model.embed(request.token_ids)
    chosen, ratios = torch.arange(len(reused)), rule.ratios(model.num_layers)
    for layer in range(model.num_layers):
        q, k, v = model.qkv(layer, hidden, request.positions)
        k, v = k.clone(), v.clone()
        rest = torch.ones(len(reused), dtype=torch.bool)
        rest[chosen] = False
        k[reused[rest]], v[reused[rest]] = placed[layer][0][rest], placed[layer][1][rest]
        if layer >= rule.layer:
            pairs = {"k": (k, placed[layer][0]), "v": (v, placed[layer][1])}
            d = sum(deviation(pairs[m][0][reused[chosen]], pairs[m][1][chosen]) for m in rule.metric)
            count = tokens_of_ratio(ratios[layer - rule.layer], len(reused))
            chosen = chosen[top_rows(d, count)]
        kv.write(layer, rows, k, v)
        hidden = model.finish(layer, hidden, model.attend(layer, q, [RowGroup(kv, rows)]))
        counts.append(n - len(reused) + len(chosen))
    return kv, model.logits(hidden[-1:])[0], counts, reused[chosen]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("make", [chain, isolated])
def test_equals_a_dense_forward_of_narrowing_sets(model, make, rule):
    _, request, done = run(model, make(rule), BEFORE, NOW)
    kv, logits, counts, last = narrowed(model, request, rule)
    assert done.receipt.tokens_per_layer == counts and counts == sorted(counts, reverse=True)
    assert torch.equal(done.output.selected, last) and 0 < len(last) < len(request.reused)
    torch.testing.assert_close(done.kv.k[:, : len(NOW)], kv.k, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(done.kv.v[:, : len(NOW)], kv.v, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(done.logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("metric", ["k", "v", "kv"])
def test_one_step_chooses_what_top_deviation_chooses(model, metric, layer):
    """They differ in the selection layer's KV alone: the other tokens' fresh KV is used there."""
    rule, once = GradualFiltering(0.3, layer, steps=1, metric=metric), TopDeviation(0.3, layer, metric=metric)
    _, request, done = run(model, isolated(rule), BEFORE, NOW)
    _, _, other = run(model, isolated(once), BEFORE, NOW)
    assert torch.equal(done.output.selected, other.output.selected)
    assert done.receipt.tokens_per_layer == other.receipt.tokens_per_layer
    index = (~torch.isin(request.reused, done.output.selected)).nonzero()[:, 0]
    placed = placed_cache(model, request, index)
    kv, logits = oracle(model, request.token_ids, request.positions, layer + 1, request.reused[index], placed)
    torch.testing.assert_close(done.kv.k[:, : len(NOW)], kv.k, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(done.logits, logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(done.kv.k[layer], other.kv.k[layer], atol=1e-3)


@pytest.mark.parametrize("name", ["cacheblend_gradual", "cacheblend_code"])
def test_everything_selected_is_recompute_and_nothing_is_the_cache(model, name):
    _, hidden = dense(model, torch.tensor(NOW.token_ids), torch.arange(len(NOW)))
    errors = []
    for ratio in (0.0, 1.0):
        engine = ReuseEngine(model, load_policy(name).at_ratio(ratio), MemoryChunkStore(), chunk_size=16)
        engine.build(BEFORE)
        done = engine.prefill(NOW)
        errors.append(float((done.logits - model.logits(hidden[-1:])[0]).abs().max()))
        assert done.receipt.tokens_recomputed == ratio * (6 + 23 + 31 + 17)
    assert errors[1] < 1e-4 < errors[0]


def test_packed_requests_are_what_each_is_alone(model):
    engine = ReuseEngine(model, isolated(GradualFiltering(0.3, spread=0.8)), MemoryChunkStore(), chunk_size=16)
    engine.build(BEFORE)
    prompts = [NOW, prompt(29, 8, fixed=(23, 31)), prompt(13, 6, fixed=(99,))]  # the last one reuses the head alone
    for one, packed in zip(map(engine.prefill, prompts), engine.prefill_batch(prompts), strict=True):
        assert packed.receipt.tokens_per_layer == one.receipt.tokens_per_layer
        torch.testing.assert_close(packed.logits, one.logits, atol=1e-4, rtol=1e-4)


def test_a_run_is_static_behind_its_last_step(model):
    for rule, layer in ((GradualFiltering(0.3, spread=0.8, steps=2), 4), (GradualFiltering(0.3, steps=1), 2)):
        _, _, done = run(model, isolated(rule), BEFORE, NOW)
        counts = done.receipt.tokens_per_layer
        assert len(set(counts[layer - 1 :])) == 1 and counts[layer - 2] > counts[layer - 1]


def test_its_settings_are_checked_and_changed_by_one(model):
    rule = GradualFiltering(0.3, spread=0.5, steps=3, metric="k")
    assert rule.at_layer(3) == replace(rule, layer=3) and rule.at_ratio(0.5) == replace(rule, recompute_ratio=0.5)
    assert rule.total_ratio == 0.3 and rule.selection_layer == rule.first_layer == 1 and not rule.needs_scores
    for wrong, why in (
        ({"recompute_ratio": 1.1}, r"recompute_ratio must lie in \[0, 1\]"),
        ({"spread": -0.1}, r"spread must lie in \[0, 1\]"),
        ({"layer": -1}, "layer must be at least 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"metric": "q"}, "metric must be"),
    ):
        with pytest.raises(PolicyError, match=why):
            GradualFiltering(**{"recompute_ratio": 0.3} | wrong)
    with pytest.raises(PolicyError, match="selects at layer 5"):
        run(model, isolated(rule.at_layer(5)), BEFORE, NOW)
