"""Rules that name reused tokens before a request starts: the first ones, and ones at random."""

from dataclasses import replace

import pytest
import torch

from baselines.random_tokens import RandomTokens
from cacheslide.core.engine import ReuseEngine
from cacheslide.core.reused import ReusedTokens
from cacheslide.errors import PolicyError
from cacheslide.policies.deviation import tokens_of_ratio
from cacheslide.policies.first_tokens import FirstTokens
from cacheslide.policies.mixed import MixedTokens
from cacheslide.policies.registry import load_policy
from cacheslide.policies.remembered import RememberedDeviation
from cacheslide.store import MemoryChunkStore
from tests.helpers.prompts import prompt

RULES = [FirstTokens, RandomTokens, RememberedDeviation, MixedTokens]  # the last two with nothing remembered
FIXED = 6 + 23 + 31 + 17


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("ratio", "rows", "count"), [(0, 9, 0), (0.5, 9, 5), (0.1, 25, 3), (0.1, 24, 2), (1, 9, 9)])
def test_counts_are_rounded_half_up(rule, ratio, rows, count):
    assert int(rule(ratio).known_before_start(ReusedTokens.of(rows)).sum()) == count == tokens_of_ratio(ratio, rows)
    split = rule(ratio).known_before_start(ReusedTokens.of(rows - 4, 3, 1))
    assert split.shape == (rows,) and split.dtype == torch.bool and int(split.sum()) == count  # over all chunks at once


@pytest.mark.parametrize("rule", RULES)
def test_another_ratio_changes_nothing_else(rule):
    one = rule(0.2)
    assert one.at_ratio(0.7) == rule(0.7) and one.at_ratio(0.7).total_ratio == 0.7 and one.total_ratio == 0.2
    assert one.at_layer(4) == one and one.selection_layer is None and one.first_layer == 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ratio", [-0.01, 1.01, float("nan")])
def test_a_ratio_outside_of_0_to_1_is_refused(rule, ratio):
    with pytest.raises(PolicyError, match=r"recompute_ratio must lie in \[0, 1\]"):
        rule(ratio)
    with pytest.raises(PolicyError):
        rule(0.5).at_ratio(ratio)


def test_first_tokens_are_the_first_over_all_chunks_together():
    assert FirstTokens(0.5).known_before_start(ReusedTokens.of(2, 4)).tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("source", ["cacheslide_first_turn", "cacheslide", "cacheblend"])
def test_served_tokens_are_counted_and_all_of_them_are_recompute(model, rule, source):
    exact = ReuseEngine(model, load_policy("recompute"), MemoryChunkStore()).prefill(prompt(13, 5))
    errors = []
    for ratio in (0.0, 0.3, 1.0):
        policy = replace(load_policy(source), correction=rule(ratio))
        engine = ReuseEngine(model, policy, MemoryChunkStore())
        engine.build(prompt(7, 3))
        state = engine.prefill(prompt(13, 5))
        count, receipt = tokens_of_ratio(ratio, FIXED), state.receipt
        assert (receipt.tokens_recomputed, receipt.tokens_reused) == (count, FIXED - count)
        assert receipt.tokens_per_layer == [receipt.tokens - FIXED + count] * model.num_layers
        errors.append(float((state.logits - exact.logits).abs().max()))
    assert errors[2] < 1e-4 < errors[0]
