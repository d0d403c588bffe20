"""No correction: reused tokens keep their placed KV."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cacheslide.core.reused import ReusedTokens
from cacheslide.policies.static import StaticCorrection


@dataclass(frozen=True)
class NoCorrection(StaticCorrection):
    """Recomputes no reused token."""

    def known_before_start(self, reused: ReusedTokens) -> Tensor:
        """Bool [R], all false."""
        return torch.zeros(reused.count, dtype=torch.bool)

    def at_ratio(self, ratio: float) -> "NoCorrection":
        """The same rule: no token is recomputed at any ratio."""
        return self
