"""Control: recomputes the tokens with the longest cached keys from layer 0. It reads the cache and compares nothing.

If a model normalises keys to one length in every layer, the choice is random; otherwise a key's length depends on the
token's context.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baselines.static_choice import first_ranked
from cacheslide.core.reused import ReusedTokens
from cacheslide.policies.deviation import tokens_of_ratio
from cacheslide.policies.static import RatioCorrection


@dataclass(frozen=True)
class KeyNorm(RatioCorrection):
    """The `recompute_ratio` of the reused tokens with the longest keys, or with `smallest` the shortest ones.

    A token's score is the mean over all layers of its key's length, all KV heads as one vector, divided by the layer's
    mean length. Rotation changes no length. Scores that differ by less than a thousandth (rounding) are equal, and ties
    are drawn from `seed`.
    """

    smallest: bool = False
    seed: int = 0

    def known_before_start(self, reused: ReusedTokens) -> None:
        """None, since the cached keys determine the tokens: see `choose`."""

    def choose(self, request: Any, model: Any) -> Tensor:
        """See `Correction.choose`."""
        count = tokens_of_ratio(self.recompute_ratio, len(request.reused))
        score = torch.zeros(len(request.reused), device=request.reused.device)
        for layer in range(model.num_layers):
            keys, _ = request.source.layer(layer)
            length = keys.float().flatten(1).norm(dim=1)
            score += length / length.mean().clamp_min(1e-12)
        rank = (score.cpu() * (1000 / model.num_layers)).round()
        chosen = first_ranked(rank if self.smallest else -rank, count, self.seed)
        return chosen.nonzero()[:, 0].to(request.reused.device)
