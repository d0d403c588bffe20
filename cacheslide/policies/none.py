"""No correction: reused tokens keep the KV that was placed for them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cacheslide.core.reused import ReusedTokens
from cacheslide.policies.static import StaticCorrection


@dataclass(frozen=True)
class NoCorrection(StaticCorrection):
    """Reused tokens stay as they were placed."""

    def known_before_start(self, reused: ReusedTokens) -> Tensor:
        """None of them is recomputed."""
        return torch.zeros(reused.count, dtype=torch.bool)

    def at_ratio(self, ratio: float) -> "NoCorrection":
        """Nothing to scale: no token is recomputed at any share."""
        return self
