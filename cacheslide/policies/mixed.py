"""Three rules share a budget: remembered deviation, the first tokens, and overlap with the updated text.

Each alone has a failure case (docs/real.md): scores do not depend on this update, overlap misses changes where the
updated text has no tokens in common with the reused text, and first tokens miss text far after an update.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cacheslide.core.reused import ReusedTokens
from cacheslide.errors import PolicyError
from cacheslide.policies.deviation import check_ratio, tokens_of_ratio, top_mask
from cacheslide.policies.overlap import DECAY, check_decay, overlap
from cacheslide.policies.remembered import choose_by_score
from cacheslide.policies.static import RatioCorrection


@dataclass(frozen=True)
class MixedTokens(RatioCorrection):
    """The `recompute_ratio` of reused tokens, chosen by three rules one after the other.

    The share `remembered` is chosen first, by remembered deviation (`choose_by_score`); then first tokens, with the
    share 1 - `remembered` - `overlap`; then the share `overlap` by overlap with the updated text. Each rule takes its
    best tokens among those not yet chosen, so that all places are used. Without remembered deviation that share goes to
    first tokens: the rule is `OverlapTokens` with `lead` 1 - `overlap`.

    Attributes
    ----------
    remembered, overlap : float
        Shares of the recomputed tokens, together at most 1.
    decay : float
        See `overlap.overlap`.
    """

    remembered: float = 2 / 3
    overlap: float = 1 / 3
    decay: float = DECAY

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio("remembered", self.remembered)
        check_ratio("overlap", self.overlap)
        check_decay(self.decay)
        if (total := self.remembered + self.overlap) > 1:
            raise PolicyError(f"the shares remembered and overlap sum up to {total:g}, above 1")

    def known_before_start(self, reused: ReusedTokens) -> Tensor:
        """Bool [R]."""
        count = tokens_of_ratio(self.recompute_ratio, reused.count)
        by_score, by_overlap = (tokens_of_ratio(share, count) for share in (self.remembered, self.overlap))
        chosen = choose_by_score(reused.remembered, by_score)
        scores = overlap(reused, self.decay).masked_fill_(chosen, -torch.inf)
        scores[(~chosen).nonzero()[: max(0, count - by_score - by_overlap), 0]] = torch.inf
        return chosen.logical_or_(top_mask(scores, count - by_score))

    @property
    def needs_scores(self) -> bool:
        """See `Correction.needs_scores`."""
        return self.remembered > 0
