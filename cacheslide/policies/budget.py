"""Recomputes tokens from layer 0 until a bound on the remaining remembered deviation holds, instead of a ratio."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cacheslide.core.reused import ReusedTokens
from cacheslide.policies.deviation import check_ratio, tokens_of_ratio
from cacheslide.policies.remembered import RememberedDeviation
from cacheslide.policies.static import StaticCorrection


@dataclass(frozen=True)
class DeviationBudget(StaticCorrection):
    """The fewest tokens, by remembered deviation, that leave at most the share `left` of its sum uncorrected.

    Of the tokens without a remembered deviation, the first ones, a share of `otherwise`, are recomputed.
    """

    left: float = 0.5
    otherwise: float = 0.1

    def __post_init__(self) -> None:
        check_ratio("left", self.left)
        check_ratio("otherwise", self.otherwise)

    def at_ratio(self, ratio: float) -> RememberedDeviation:
        """The same order of tokens, cut at `ratio` instead of a budget."""
        return RememberedDeviation(ratio)

    def known_before_start(self, reused: ReusedTokens) -> Tensor:
        """Bool [R]."""
        scores = reused.remembered.double().clamp(0, torch.finfo(torch.float32).max)  # an overflow is a high score
        known, unknown = (x.nonzero()[:, 0] for x in (~scores.isnan(), scores.isnan()))
        ranked = known[scores[known].argsort(descending=True, stable=True)].flip(0)  # lowest first, then the later one
        standing = scores[ranked].cumsum(0)
        stay = int((standing <= self.left * standing[-1]).sum()) if len(ranked) else 0
        chosen = torch.zeros(reused.count, dtype=torch.bool)
        chosen[ranked[stay:]] = True
        chosen[unknown[: tokens_of_ratio(self.otherwise, len(unknown))]] = True
        return chosen

    @property
    def needs_scores(self) -> bool:
        """See `Correction.needs_scores`."""
        return True
