"""The tokens right behind updated text are recomputed, from layer 0: what has changed stands closest to them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cacheslide.core.reused import ReusedTokens
from cacheslide.policies.deviation import tokens_of_ratio
from cacheslide.policies.static import RatioCorrection


def apportion(count: int, sizes: Sequence[int]) -> list[int]:
    """`count` places shared out in proportion to `sizes`, at most a size each, by largest remainders (the first's of
    equal ones); all of the sizes where they sum up to no more."""
    total = sum(sizes)
    if count >= total:
        return list(sizes)
    shares = [divmod(count * n, total) for n in sizes]
    left = count - sum(whole for whole, _ in shares)
    first = sorted(range(len(sizes)), key=lambda i: -shares[i][1])[:left]
    return [whole + (i in first) for i, (whole, _) in enumerate(shares)]


@dataclass(frozen=True)
class BoundaryTokens(RatioCorrection):
    """The first tokens of every stretch of reused text behind an update.

    Together they are the `recompute_ratio` of all reused tokens, shared out in proportion to the stretches' lengths. A
    stretch goes up to the next update, whatever chunks it is cut into. Text in front of every update stays as it is: a
    ratio that the stretches cannot take up is not used up.
    """

    def known_before_start(self, reused: ReusedTokens) -> Tensor:
        """Bool [R]."""
        chosen, stretches = torch.zeros(reused.count, dtype=torch.bool), reused.stretches
        counts = apportion(tokens_of_ratio(self.recompute_ratio, reused.count), [len(s) for s in stretches])
        for stretch, count in zip(stretches, counts, strict=True):
            chosen[stretch.start : stretch.start + count] = True
        return chosen
