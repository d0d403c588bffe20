"""Control: tokens recomputed at random, from layer 0. A rule that is no better chooses nothing."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cacheslide.core.reused import ReusedTokens
from cacheslide.policies.deviation import check_ratio, tokens_of_ratio
from cacheslide.policies.static import StaticCorrection


@dataclass(frozen=True)
class RandomTokens(StaticCorrection):
    """`recompute_ratio` of a prompt's reused tokens, drawn without replacement; the same ones for equal lengths."""

    recompute_ratio: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_ratio("recompute_ratio", self.recompute_ratio)

    def at_ratio(self, ratio: float) -> "RandomTokens":
        """The same rule recomputing `ratio` of the reused tokens."""
        return replace(self, recompute_ratio=ratio)

    def known_before_start(self, reused: ReusedTokens) -> Tensor:
        """Bool [R]."""
        count = reused.count
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        return order < tokens_of_ratio(self.recompute_ratio, count)

    @property
    def total_ratio(self) -> float:
        """See `Correction.total_ratio`."""
        return self.recompute_ratio
