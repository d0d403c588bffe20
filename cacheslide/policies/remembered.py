"""Recomputes the tokens whose KV depends most on updated text, by remembered deviation, from layer 0.

When a chunk's KV is computed a second time, in another turn, each token's deviation is measured and stored. Choosing
tokens by it then costs no computation: no layer is computed in full only to compare.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cacheslide.core.reused import ReusedTokens
from cacheslide.errors import PolicyError
from cacheslide.policies.deviation import tokens_of_ratio, top_mask
from cacheslide.policies.static import RatioCorrection


def choose_by_score(scores: Tensor, count: int) -> Tensor:
    """Bool [n]: the `count` tokens of the highest `scores` [n], where NaN is an unknown score.

    Places are divided between tokens with known and unknown scores in proportion to their numbers; unknown ones are
    taken in order. Ranked above all known ones, a long unknown chunk would take every place; ranked below, it would
    never be recomputed. Ties go to the earlier token.
    """
    missing = scores.isnan()
    if not missing.any():
        return top_mask(scores, count)
    known, unknown = (x.nonzero()[:, 0] for x in (~missing, missing))
    by_score = tokens_of_ratio(count / max(len(scores), 1), len(known))
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[known] = top_mask(scores[known], by_score)
    chosen[unknown[: count - by_score]] = True
    return chosen


@dataclass(frozen=True)
class RememberedDeviation(RatioCorrection):
    """The `recompute_ratio` of a prompt's reused tokens of the highest remembered deviation.

    Within the ratio, the first `boundary` tokens after each update come before all others, the closest to their update
    first. Without any remembered deviation the rule is `FirstTokens`.
    """

    boundary: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.boundary < 0:
            raise PolicyError(f"boundary must be at least 0 tokens, not {self.boundary}")

    def known_before_start(self, reused: ReusedTokens) -> Tensor:
        """Bool [R]."""
        count = tokens_of_ratio(self.recompute_ratio, reused.count)
        chosen = torch.zeros(reused.count, dtype=torch.bool)
        closest = sorted((n, at) for s in reused.stretches for n, at in enumerate(s[: self.boundary]))[:count]
        chosen[[at for _, at in closest]] = True
        others = (~chosen).nonzero()[:, 0]
        chosen[others] = choose_by_score(reused.remembered[others], count - len(closest))
        return chosen

    @property
    def needs_scores(self) -> bool:
        """See `Correction.needs_scores`."""
        return True
