"""The first tokens of the reused text are recomputed, from layer 0: no layer is computed only to choose them.

What stands right behind an updated segment has that segment closest in its context. The rule is the simplest of its
kind and the control that a rule with a selection layer has to beat.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cacheslide.core.reused import ReusedTokens
from cacheslide.policies.deviation import check_ratio, tokens_of_ratio
from cacheslide.policies.static import StaticCorrection


@dataclass(frozen=True)
class FirstTokens(StaticCorrection):
    """The first `recompute_ratio` of a prompt's reused tokens, counted over all of its chunks together."""

    recompute_ratio: float = 0.1

    def __post_init__(self) -> None:
        check_ratio("recompute_ratio", self.recompute_ratio)

    def at_ratio(self, ratio: float) -> "FirstTokens":
        """The same rule recomputing `ratio` of the reused tokens."""
        return replace(self, recompute_ratio=ratio)

    def known_before_start(self, reused: ReusedTokens) -> Tensor:
        """Bool [R]."""
        return torch.arange(reused.count) < tokens_of_ratio(self.recompute_ratio, reused.count)

    @property
    def total_ratio(self) -> float:
        """See `Correction.total_ratio`."""
        return self.recompute_ratio
