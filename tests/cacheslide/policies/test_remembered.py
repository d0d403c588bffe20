"""Rules that read what chunks remember of their tokens, and the tokens behind updates, before a request starts."""

import math

import pytest
import torch

from cacheslide.core.reused import ReusedTokens
from cacheslide.errors import PolicyError
from cacheslide.policies.boundary import BoundaryTokens, apportion
from cacheslide.policies.budget import DeviationBudget
from cacheslide.policies.deviation import tokens_of_ratio
from cacheslide.policies.first_tokens import FirstTokens
from cacheslide.policies.remembered import RememberedDeviation
from cacheslide.policies.shrinking import ShrinkingTokens

NAN = math.nan
# a prefix, then two stretches behind updates; the first is cut into two chunks
RUNS = (0, 6, 9, 14), (4, 3, 2, 6)


def runs(scores=None) -> ReusedTokens:
    return ReusedTokens(*RUNS, None if scores is None else torch.tensor(scores))


def rows(rule, reused) -> list[int]:
    mask = rule.known_before_start(reused)
    assert mask.shape == (reused.count,) and mask.dtype == torch.bool and mask.device.type == "cpu"
    return mask.nonzero()[:, 0].tolist()


def ranked(scores: list[float], count: int) -> list[int]:
    """Plainly: the `count` highest, the earlier of equal ones."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def test_stretches_run_from_update_to_update():
    assert runs().stretches == (range(4, 9), range(9, 15))
    assert ReusedTokens.of(5, 2).stretches == () == ReusedTokens().stretches
    assert ReusedTokens((1, 3), (2, 2)).stretches == (range(0, 4),)
    assert runs().remembered.isnan().all() and runs([1.0] * 15).remembered.sum() == 15


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.26, 0.5, 1.0])
def test_the_highest_scores_over_all_chunks_are_recomputed(seed, ratio):
    scores = torch.randint(0, 6, (15,), generator=torch.Generator().manual_seed(seed)).float().tolist()  # with ties
    assert rows(RememberedDeviation(ratio), runs(scores)) == ranked(scores, tokens_of_ratio(ratio, 15))
    assert rows(RememberedDeviation(ratio), runs([2.0] * 15)) == rows(FirstTokens(ratio), runs())
    assert rows(RememberedDeviation(ratio), runs([NAN] * 15)) == rows(FirstTokens(ratio), runs())


@pytest.mark.parametrize("known", [(), (0,), (14,), (9, 10, 11, 12, 13, 14), (0, 1, 2, 3), tuple(range(14))])
@pytest.mark.parametrize("count", range(16))
def test_unknown_tokens_have_their_share_of_the_places(known, count):
    """Neither a long chunk of which nothing is remembered nor one with scores takes all of them."""
    scores = [float(i) if i in known else NAN for i in range(15)]
    chosen = rows(RememberedDeviation(count / 15), runs(scores))
    one, other = [i for i in chosen if i in known], [i for i in chosen if i not in known]
    assert len(chosen) == count and abs(len(one) - count * len(known) / 15) <= 0.5
    assert one == sorted(known)[len(known) - len(one) :]  # the highest
    assert other == [i for i in range(15) if i not in known][: len(other)]  # the first


def test_tokens_behind_updates_come_first_and_the_closest_of_them():
    scores = [9.0, *[0.0] * 13, 8.0]
    assert rows(RememberedDeviation(5 / 15, boundary=2), runs(scores)) == [0, 4, 5, 9, 10]
    assert rows(RememberedDeviation(3 / 15, boundary=2), runs(scores)) == [4, 5, 9]  # no room for all four
    assert rows(RememberedDeviation(1.0, boundary=2), runs(scores)) == list(range(15))
    assert rows(RememberedDeviation(13 / 15, boundary=99), runs(scores)) == [0, 1, *range(4, 15)]
    assert rows(RememberedDeviation(2 / 15, boundary=9), ReusedTokens.of(15, scores=scores)) == [0, 14]  # no update
    assert RememberedDeviation(0.1, 32).at_ratio(0.3) == RememberedDeviation(0.3, 32)


def test_the_tokens_behind_updates_share_a_ratio_by_the_lengths_of_their_stretches():
    assert rows(BoundaryTokens(0.0), runs()) == []
    assert rows(BoundaryTokens(1 / 15), runs()) == [9]  # 5/11 and 6/11 of a token: the larger remainder
    assert rows(BoundaryTokens(6 / 15), runs()) == [4, 5, 6, 9, 10, 11]
    assert rows(BoundaryTokens(1.0), runs()) == list(range(4, 15))  # what stands in front of every update stays
    assert rows(BoundaryTokens(0.5), ReusedTokens.of(9, 3)) == [] == rows(BoundaryTokens(1.0), ReusedTokens())
    whole, cut = ReusedTokens((3,), (30,)), ReusedTokens((3, 10, 12), (7, 2, 21))
    assert rows(BoundaryTokens(0.2), whole) == rows(BoundaryTokens(0.2), cut) == list(range(6))


@pytest.mark.parametrize("sizes", [(), (1,), (5, 5, 5), (1, 100), (7, 3, 1, 2)])
def test_places_are_shared_out_fully_and_fairly(sizes):
    for count in range(sum(sizes) + 3):
        shares = apportion(count, sizes)
        places = min(count, sum(sizes))
        assert sum(shares) == places and len(shares) == len(sizes)
        for n, size in zip(shares, sizes, strict=True):
            assert 0 <= n <= size and abs(n - places * size / sum(sizes)) < 1
    assert apportion(2, (4, 4, 4)) == [1, 1, 0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("left", [0.0, 0.1, 0.3, 0.5, 0.99, 1.0])
def test_a_budget_takes_the_fewest_tokens_that_leave_no_more_standing(seed, left):
    scores = torch.randint(0, 9, (15,), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = rows(DeviationBudget(left), runs([float(x) for x in scores]))
    assert chosen == ranked(scores, len(chosen))
    assert sum(scores) - sum(scores[i] for i in chosen) <= left * sum(scores)
    if chosen:
        fewer = ranked(scores, len(chosen) - 1)
        assert sum(scores) - sum(scores[i] for i in fewer) > left * sum(scores)


def test_a_budget_without_scores_is_a_ratio():
    assert rows(DeviationBudget(0.5), runs()) == [0, 1] == rows(FirstTokens(0.1), runs())
    assert rows(DeviationBudget(0.5, otherwise=0.4), runs([NAN] * 15)) == list(range(6))
    mixed = [NAN] * 10 + [1.0, 6.0, 1.0, 1.0, 1.0]
    assert rows(DeviationBudget(0.4, otherwise=0.2), runs(mixed)) == [0, 1, 11]
    assert rows(DeviationBudget(0.5), runs([0.0] * 15)) == [] == rows(DeviationBudget(0.5), ReusedTokens())
    assert rows(DeviationBudget(0.5), runs([1.0] * 14 + [math.inf])) == [14]
    one = DeviationBudget(0.3)
    assert one.total_ratio is None and one.at_ratio(0.2) == RememberedDeviation(0.2)


def test_a_set_shrinks_by_halves_down_to_its_floor():
    rule = ShrinkingTokens(0.5, floor=0.2, every=3)
    assert [rule.count(layer, 37) for layer in range(12)] == [37] * 3 + [18] * 3 + [9] * 3 + [7] * 3
    assert [ShrinkingTokens(0.5, 0.0, 1).count(layer, 5) for layer in range(4)] == [5, 2, 1, 0]
    assert [ShrinkingTokens(0.5, 1.0, 1).count(layer, 5) for layer in range(4)] == [5] * 4
    scores = [float(i) for i in range(15)]
    assert rows(rule.at_ratio(0.2), runs(scores)) == [12, 13, 14] and rule.at_ratio(0.2).every == 3


@pytest.mark.parametrize("rule", [RememberedDeviation, BoundaryTokens, ShrinkingTokens, DeviationBudget])
def test_bad_shares_are_refused_in_one_line(rule):
    for share in (-0.01, 1.01, NAN):
        with pytest.raises(PolicyError, match=r"must lie in \[0, 1\], not") as refused:
            rule(share)
        with pytest.raises(PolicyError, match=r"must lie in \[0, 1\], not"):
            rule(0.5).at_ratio(share)
        assert "\n" not in str(refused.value)


def test_other_bad_arguments_are_named():
    for make, why in (
        (lambda: RememberedDeviation(0.1, -1), "boundary must be at least 0 tokens, not -1"),
        (lambda: ShrinkingTokens(0.1, 0.5, 0), "every must be at least 1 layer, not 0"),
        (lambda: ShrinkingTokens(0.1, 2.0), r"floor must lie in \[0, 1\]"),
        (lambda: DeviationBudget(0.1, -1.0), r"otherwise must lie in \[0, 1\]"),
    ):
        with pytest.raises(PolicyError, match=why):
            make()


def test_who_needs_scores_says_so():
    needing = [RememberedDeviation(), DeviationBudget(), ShrinkingTokens()]
    assert all(rule.needs_scores for rule in needing) and not BoundaryTokens().needs_scores
    for rule in (*needing, BoundaryTokens()):
        assert rule.at_layer(3) == rule and rule.selection_layer is None and rule.first_layer == 0
        assert rule.check("p", 1) is None and rule.choose(None, None) is None
