"""The reused tokens that the updated text speaks of are recomputed, from layer 0.

What an update changes in fixed text is, above all, what both mention: a name in the notes changes what the passages say
of it. Which tokens these are follows from the ids alone, before anything is computed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cacheslide.core.reused import ReusedTokens
from cacheslide.errors import PolicyError
from cacheslide.policies.deviation import check_ratio, tokens_of_ratio, top_rows
from cacheslide.policies.static import RatioCorrection


@dataclass(frozen=True)
class OverlapTokens(RatioCorrection):
    """The `recompute_ratio` of reused tokens of the highest overlap with the tokens that are not reused.

    A reused token whose id stands in the updated text too weighs one over the times that the id stands in the reused
    text. A token's overlap is the sum of the weights of itself and of the tokens before it, each `decay` times as much
    as the one behind it: what follows a name is what says something of it. Ties, and tokens without any overlap, go by
    position, the first ones first. `lead` is the share of the recomputed tokens that are the first of the reused text,
    whatever they say.
    """

    decay: float = 0.95
    lead: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio("lead", self.lead)
        if not 0 <= self.decay < 1:
            raise PolicyError(f"decay must lie in [0, 1), not {self.decay}")

    def known_before_start(self, reused: ReusedTokens) -> Tensor:
        """Bool [R]."""
        count = tokens_of_ratio(self.recompute_ratio, reused.count)
        scores = self.overlap(reused)
        scores[: tokens_of_ratio(self.lead, count)] = torch.inf
        mask = torch.zeros(reused.count, dtype=torch.bool)
        mask[top_rows(scores, count)] = True
        return mask

    def overlap(self, reused: ReusedTokens) -> Tensor:
        """Float64 [R]: the overlap of every reused token; zeros where the ids are not known."""
        if not len(reused.token_ids) or not reused.count:
            return torch.zeros(reused.count, dtype=torch.float64)
        ids = torch.as_tensor(reused.token_ids, dtype=torch.int64)
        rows = torch.cat([torch.arange(s, s + n) for s, n in zip(reused.starts, reused.lengths, strict=True)])
        live = torch.ones(len(ids), dtype=torch.bool)
        live[rows] = False
        own = ids[rows]
        _, which, times = own.unique(return_inverse=True, return_counts=True)
        weights = torch.where(torch.isin(own, ids[live]), 1 / times[which].double(), 0.0)
        out, carried = [], 0.0
        for weight in weights.tolist():
            carried = carried * self.decay + weight
            out.append(carried)
        return torch.tensor(out, dtype=torch.float64)
