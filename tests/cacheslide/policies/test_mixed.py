"""The rule that shares its budget between remembered deviation, first tokens and overlap."""

import random

import pytest
import torch

from cacheslide.core.reused import ReusedTokens
from cacheslide.errors import PolicyError
from cacheslide.policies.deviation import tokens_of_ratio
from cacheslide.policies.first_tokens import FirstTokens
from cacheslide.policies.mixed import MixedTokens
from cacheslide.policies.overlap import OverlapTokens, overlap
from cacheslide.policies.remembered import RememberedDeviation, choose_by_score

SPLITS = [(0.5, 0.25), (1 / 3, 1 / 3), (2 / 3, 1 / 3), (0.5, 0.5), (0.9, 0.1), (0.0, 0.4), (0.4, 0.0)]


def drawn(seed: int, remembered: float = 1.0) -> ReusedTokens:
    """Two runs between updates; `remembered` is the share of tokens with a score."""
    rng = random.Random(seed)
    ids = [rng.randint(0, 30) for _ in range(70)]
    scores = [rng.random() if rng.random() < remembered else float("nan") for _ in range(55)]
    return ReusedTokens((5, 40), (30, 25), torch.tensor(scores), ids)


def plain(reused: ReusedTokens, ratio: float, remembered: float, by_words: float) -> list[int]:
    """The docstring's words, rule by rule."""
    count = tokens_of_ratio(ratio, reused.count)
    first_count = tokens_of_ratio(remembered, count)
    last_count = min(tokens_of_ratio(by_words, count), count - first_count)
    taken = choose_by_score(reused.remembered, first_count).nonzero()[:, 0].tolist()
    taken += [i for i in range(reused.count) if i not in taken][: count - first_count - last_count]
    scores = overlap(reused).tolist()
    left = sorted((i for i in range(reused.count) if i not in taken), key=lambda i: (-scores[i], i))
    return sorted(taken + left[:last_count])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.1, 0.33, 0.8, 1.0])
@pytest.mark.parametrize("remembered", [1.0, 0.6, 0.0])
def test_each_rule_takes_its_best_tokens_that_are_left(split, ratio, remembered):
    for seed in range(5):
        reused = drawn(seed, remembered)
        chosen = MixedTokens(ratio, *split).known_before_start(reused)
        assert chosen.nonzero()[:, 0].tolist() == plain(reused, ratio, *split)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.33, 1.0])
def test_a_whole_budget_for_one_rule_is_that_rule(ratio):
    for seed in range(5):
        reused = drawn(seed, 0.7)
        for split, rule in (
            ((1.0, 0.0), RememberedDeviation(ratio)),
            ((0.0, 0.0), FirstTokens(ratio)),
            ((0.0, 1.0), OverlapTokens(ratio)),
        ):
            got, want = (r.known_before_start(reused) for r in (MixedTokens(ratio, *split), rule))
            assert torch.equal(got, want)


@pytest.mark.parametrize("by_words", [0.25, 0.5])
def test_without_scores_the_rest_of_the_budget_is_first_tokens(by_words):
    for seed in range(5):
        reused = drawn(seed, 0.0)
        got = MixedTokens(0.3, 0.5, by_words).known_before_start(reused)  # 17 tokens: 9 by score, 4 or 8 by overlap
        want = OverlapTokens(0.3, lead=1 - tokens_of_ratio(by_words, 17 if by_words < 0.5 else 16) / 17)
        assert torch.equal(got, want.known_before_start(reused))


def test_without_ids_and_scores_it_is_the_first_tokens():
    assert MixedTokens(0.3).known_before_start(ReusedTokens.of(10)).tolist() == [True] * 3 + [False] * 7
    assert MixedTokens(0.3).known_before_start(ReusedTokens()).shape == (0,)


def test_chunks_are_kept_with_scores_where_the_rule_reads_them():
    assert MixedTokens(0.1, 0.1, 0.0).needs_scores and not MixedTokens(0.1, 0.0, 0.9).needs_scores
    assert MixedTokens(0.1, 0.2, 0.3).at_ratio(0.4) == MixedTokens(0.4, 0.2, 0.3)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((1.5,), "recompute_ratio"),
        ((0.1, -0.1), "remembered"),
        ((0.1, 0.5, float("nan")), "overlap"),
        ((0.1, 0.75, 0.5), "shares remembered and overlap sum up to 1.25, above 1"),
        ((0.1, 0.5, 0.5, 1.0), "decay"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, word):
    with pytest.raises(PolicyError, match=word):
        MixedTokens(*arguments)
