"""Recomputes the first tokens of the reused text from layer 0; no layer is computed only to choose them.

Tokens right after an updated segment have it closest in their context. This simplest rule is the control that a rule
with a selection layer has to beat.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cacheslide.core.reused import ReusedTokens
from cacheslide.policies.deviation import tokens_of_ratio
from cacheslide.policies.static import RatioCorrection


@dataclass(frozen=True)
class FirstTokens(RatioCorrection):
    """The first `recompute_ratio` of a prompt's reused tokens, counted over all chunks together."""

    def known_before_start(self, reused: ReusedTokens) -> Tensor:
        """Bool [R]."""
        return torch.arange(reused.count) < tokens_of_ratio(self.recompute_ratio, reused.count)
