"""The first tokens of the reused text are recomputed, from layer 0: no layer is computed only to choose them.

What stands right behind an updated segment has that segment closest in its context. The rule is the simplest of its
kind and the control that a rule with a selection layer has to beat.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cacheslide.core.reused import ReusedTokens
from cacheslide.policies.deviation import tokens_of_ratio
from cacheslide.policies.static import RatioCorrection


@dataclass(frozen=True)
class FirstTokens(RatioCorrection):
    """The first `recompute_ratio` of a prompt's reused tokens, counted over all of its chunks together."""

    def known_before_start(self, reused: ReusedTokens) -> Tensor:
        """Bool [R]."""
        return torch.arange(reused.count) < tokens_of_ratio(self.recompute_ratio, reused.count)
