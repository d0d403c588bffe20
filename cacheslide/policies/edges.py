"""EPIC's rule: recomputes the edges of every chunk (arXiv 2410.15332)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cacheslide.core.reused import ReusedTokens
from cacheslide.errors import PolicyError
from cacheslide.policies.deviation import check_ratio
from cacheslide.policies.static import StaticCorrection


@dataclass(frozen=True)
class EdgeTokens(StaticCorrection):
    """EPIC: the first `head` and last `tail` rows of every chunk, or the share `recompute_ratio` of it if given."""

    head: int = 32
    tail: int = 32
    recompute_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.head < 0 or self.tail < 0:
            raise PolicyError("head and tail must be at least 0")
        if self.recompute_ratio is not None:
            check_ratio("recompute_ratio", self.recompute_ratio)

    def edges(self, length: int) -> tuple[int, int]:
        """Rows recomputed at the start and at the end of a chunk of `length` rows."""
        if self.recompute_ratio is None:
            return self.head, self.tail
        n = round(self.recompute_ratio * length)
        return n - n // 2, n // 2

    def at_ratio(self, ratio: float) -> "EdgeTokens":
        """The same rule recomputing `ratio` of every chunk."""
        return replace(self, recompute_ratio=ratio)

    def known_before_start(self, reused: ReusedTokens) -> Tensor:
        """Bool [R]: the head and tail rows of every run."""
        parts = [torch.zeros(0, dtype=torch.bool)]
        for length in reused.lengths:
            head, tail = self.edges(length)
            at = torch.arange(length)
            parts.append((at < head) | (at >= length - tail))
        return torch.cat(parts)

    @property
    def total_ratio(self) -> float | None:
        """See `Correction.total_ratio`."""
        return self.recompute_ratio
