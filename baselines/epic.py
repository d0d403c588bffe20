"""EPIC (PIC, arXiv 2410.15332): isolated chunks; the first tokens of each are recomputed (LegoLink).

LegoLink-k recomputes the first k tokens of every chunk except one that begins the prompt (`link`). The CacheSlide paper
ran it with the first and last 32 tokens of every chunk (`delta`).
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cacheslide.core.keys import ContentKeying
from cacheslide.core.placement import Placement
from cacheslide.core.reused import ReusedTokens
from cacheslide.errors import PolicyError
from cacheslide.policies.base import ReusePolicy
from cacheslide.policies.edges import EdgeTokens
from cacheslide.policies.encodings import Isolated
from cacheslide.policies.static import StaticCorrection

EDGE = 32  # the CacheSlide paper's setting, section 5
LINKS = (0, 8, 16, 32)  # EPIC's own settings


@dataclass(frozen=True)
class LegoLink(StaticCorrection):
    """The first `k` tokens of every chunk, or all of a shorter one; none of a chunk that begins the prompt.

    If vLLM's prefix cache holds the beginning of a chunk, counting starts at the first reused row.
    """

    k: int = 16

    def __post_init__(self) -> None:
        if self.k < 0:
            raise PolicyError(f"k must be at least 0 tokens, not {self.k}")

    def at_ratio(self, ratio: float) -> "LegoLink":
        """The same rule: it recomputes a fixed number of tokens per chunk, not a ratio."""
        return self

    def known_before_start(self, reused: ReusedTokens) -> Tensor:
        """Bool [R]."""
        parts = [torch.zeros(0, dtype=torch.bool)]
        for start, length in zip(reused.starts, reused.lengths, strict=True):
            first = reused.before + start == 0
            parts.append(torch.arange(length) < (0 if first else self.k))
        return torch.cat(parts)


def delta() -> ReusePolicy:
    """Cached keys are re-rotated to their new positions."""
    return ReusePolicy(
        "epic",
        "EPIC",
        keying=ContentKeying(),
        encoding=Isolated(),
        placement=Placement("delta"),
        correction=EdgeTokens(EDGE, EDGE),
    )


def stale() -> ReusePolicy:
    """Cached keys keep the positions of their isolated encoding."""
    return ReusePolicy(
        "epic_stale",
        "EPIC, stale positions",
        keying=ContentKeying(),
        encoding=Isolated(),
        placement=Placement("stored"),
        correction=EdgeTokens(EDGE, EDGE),
    )


def link(k: int) -> ReusePolicy:
    """LegoLink-k over re-rotated keys; at k = 0 nothing is recomputed."""
    return ReusePolicy(
        f"epic_{k}",
        f"EPIC, LegoLink-{k}",
        keying=ContentKeying(),
        encoding=Isolated(),
        placement=Placement("delta"),
        correction=LegoLink(k),
    )


link_0, link_8, link_16, link_32 = (partial(link, k) for k in LINKS)
