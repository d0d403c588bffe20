"""Control: recomputes random tokens from layer 0. A selection rule has to be better than this."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cacheslide.core.reused import ReusedTokens
from cacheslide.policies.deviation import tokens_of_ratio
from cacheslide.policies.static import RatioCorrection


@dataclass(frozen=True)
class RandomTokens(RatioCorrection):
    """`recompute_ratio` of a prompt's reused tokens, drawn without replacement; the same ones for equal lengths."""

    seed: int = 0

    def known_before_start(self, reused: ReusedTokens) -> Tensor:
        """Bool [R]."""
        count = reused.count
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        return order < tokens_of_ratio(self.recompute_ratio, count)
