"""Recomputes the reused tokens that share ids with the updated text, and those after them, from layer 0.

An update mostly affects fixed text that mentions the same things: a name in the notes changes passages about that name.
The choice follows from the ids alone, before anything is computed.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from cacheslide.core.reused import ReusedTokens
from cacheslide.core.tensors import tensor_of
from cacheslide.errors import PolicyError
from cacheslide.policies.deviation import check_ratio, tokens_of_ratio, top_mask
from cacheslide.policies.static import RatioCorrection

DECAY = 0.95  # a token's overlap reaches about twenty tokens on
BLOCK = 64  # tokens per product with the decays' matrix


@dataclass(frozen=True)
class OverlapTokens(RatioCorrection):
    """The `recompute_ratio` of reused tokens of the highest `overlap` with the tokens that are not reused.

    Ties, and tokens without any overlap, are ordered by position, the earliest first. `lead` is the share of the
    recomputed tokens that is taken from the start of the reused text, regardless of overlap.
    """

    decay: float = DECAY
    lead: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio("lead", self.lead)
        check_decay(self.decay)

    def known_before_start(self, reused: ReusedTokens) -> Tensor:
        """Bool [R]."""
        count = tokens_of_ratio(self.recompute_ratio, reused.count)
        scores = overlap(reused, self.decay)
        scores[: tokens_of_ratio(self.lead, count)] = torch.inf
        return top_mask(scores, count)


def check_decay(decay: float) -> None:
    """Raise PolicyError for a decay outside of [0, 1)."""
    if not 0 <= decay < 1:
        raise PolicyError(f"decay must lie in [0, 1), not {decay}")


def overlap(reused: ReusedTokens, decay: float = DECAY) -> Tensor:
    """Float64 [R]: overlap of each reused token with the updated text; zeros if the ids are not known.

    A reused token whose id also occurs in the updated text has weight 1 / (occurrences of the id in the reused text),
    any other 0. A token's overlap is the sum of its own weight and of the weights before it, decayed by `decay` per
    token of distance, since the tokens after a name depend on it.
    """
    if not len(reused.token_ids) or not reused.count:
        return torch.zeros(reused.count, dtype=torch.float64)
    ids, at, own, others = tensor_of(reused.token_ids), 0, [], []
    for start, length in zip(reused.starts, reused.lengths, strict=True):
        others.append(ids[at:start])
        own.append(ids[start : (at := start + length)])
    own, others = torch.cat(own), torch.cat([*others, ids[at:]])
    updated = torch.zeros(int(ids.max()) + 1, dtype=torch.bool)
    updated[others] = True
    weights = torch.where(updated[own], 1 / torch.bincount(own)[own].double(), 0.0)
    return decayed_sums(weights, decay)


def decayed_sums(weights: Tensor, decay: float) -> Tensor:
    """y_i = w_i + decay · y_(i-1), float64 [n] of non-negative weights [n]: a first-order linear recurrence.

    Each block of `BLOCK` takes one product with the matrix of the decays; the carry between blocks is the same
    recurrence over blocks. A sum below the smallest normal number becomes 0, since subnormal results would depend on
    the order in which powers of the decay are rounded.
    """
    count = len(weights)
    blocks = F.pad(weights.double(), (0, -count % BLOCK)).view(-1, BLOCK)
    within, onward = decays(decay)
    sums = blocks @ within
    if len(sums) > 1:
        sums[1:] += torch.outer(decayed_sums(sums[:-1, -1], decay**BLOCK), onward)
    out = sums.flatten()[:count]
    return out.masked_fill_(out < torch.finfo(out.dtype).tiny, 0.0)


@lru_cache(maxsize=64)
def decays(decay: float) -> tuple[Tensor, Tensor]:
    """Powers of the decay: j - i at (i, j) of a block, float64 [BLOCK, BLOCK], 0 for j < i; and 1 to BLOCK, [BLOCK]."""
    at, base = torch.arange(BLOCK, dtype=torch.float64), torch.tensor(decay, dtype=torch.float64)
    return (base ** (at - at[:, None]).clamp(min=0)).triu(), base ** (at + 1)
