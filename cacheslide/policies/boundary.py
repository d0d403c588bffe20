"""Recomputes the reused tokens right after updated text, which are closest to the change, from layer 0."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cacheslide.core.reused import ReusedTokens
from cacheslide.policies.deviation import tokens_of_ratio
from cacheslide.policies.static import RatioCorrection


def apportion(count: int, sizes: Sequence[int]) -> list[int]:
    """`count` places distributed in proportion to `sizes` by largest remainders (ties: the first), at most a size each;
    `sizes` themselves if their sum is at most `count`."""
    total = sum(sizes)
    if count >= total:
        return list(sizes)
    shares = [divmod(count * n, total) for n in sizes]
    left = count - sum(whole for whole, _ in shares)
    first = sorted(range(len(sizes)), key=lambda i: -shares[i][1])[:left]
    return [whole + (i in first) for i, (whole, _) in enumerate(shares)]


@dataclass(frozen=True)
class BoundaryTokens(RatioCorrection):
    """The first tokens of every stretch of reused text after an update.

    Their number is `recompute_ratio` of all reused tokens, distributed in proportion to the stretches' lengths. A
    stretch extends to the next update, across chunk borders. Text before the first update is not recomputed, even if
    the stretches are shorter than the ratio demands.
    """

    def known_before_start(self, reused: ReusedTokens) -> Tensor:
        """Bool [R]."""
        chosen, stretches = torch.zeros(reused.count, dtype=torch.bool), reused.stretches
        counts = apportion(tokens_of_ratio(self.recompute_ratio, reused.count), [len(s) for s in stretches])
        for stretch, count in zip(stretches, counts, strict=True):
            chosen[stretch.start : stretch.start + count] = True
        return chosen
