"""Tokens recomputed at random."""

from dataclasses import replace

import torch

from baselines.random_tokens import RandomTokens
from cacheslide.core.reused import ReusedTokens


def test_random_tokens_are_the_same_for_equal_lengths_and_others_for_another_seed():
    rule = RandomTokens(0.3)
    chosen = rule.known_before_start(ReusedTokens.of(40, 60))
    assert torch.equal(chosen, rule.known_before_start(ReusedTokens.of(60, 40))) and torch.equal(
        chosen, RandomTokens(0.3).known_before_start(ReusedTokens.of(100))
    )
    other = replace(rule, seed=1).known_before_start(ReusedTokens.of(40, 60))
    assert not torch.equal(chosen, other) and int(other.sum()) == 30
    assert replace(rule, seed=1).at_ratio(0.4).seed == 1
    place = chosen.nonzero()[:, 0]
    assert place.min() < 20 and place.max() >= 80 and not chosen[:30].all()
    more = rule.at_ratio(0.6).known_before_start(ReusedTokens.of(100))
    assert (more | ~chosen).all()  # more of them contain the fewer
