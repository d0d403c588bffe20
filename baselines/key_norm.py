"""Control: tokens whose cached keys are longest are recomputed, from layer 0. The cache is read, nothing is compared.

Keys of equal length in every layer (query-key norm) leave this rule little to choose by; without that norm the length
of a key is a trace of what the token has come to mean.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cacheslide.core.reused import ReusedTokens
from cacheslide.policies.deviation import tokens_of_ratio, top_rows
from cacheslide.policies.static import RatioCorrection


@dataclass(frozen=True)
class KeyNorm(RatioCorrection):
    """The `recompute_ratio` of the reused tokens with the longest keys, or with `smallest` the shortest ones.

    A token's score is the sum over all layers of its key's length, all KV heads as one vector, divided by the layer's
    mean length. Rotation changes no length.
    """

    smallest: bool = False

    def known_before_start(self, reused: ReusedTokens) -> None:
        """The keys are in the cache: see `choose`."""

    def choose(self, request: Any, model: Any) -> Tensor:
        """See `Correction.choose`."""
        count = tokens_of_ratio(self.recompute_ratio, len(request.reused))
        score = torch.zeros(len(request.reused), device=request.reused.device)
        for layer in range(model.num_layers):
            keys, _ = request.source.layer(layer)
            length = keys.float().flatten(1).norm(dim=1)
            score += length / length.mean().clamp_min(1e-12)
        return top_rows(-score if self.smallest else score, count)
