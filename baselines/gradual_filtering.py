"""CacheBlend's gradual filtering: the recomputed tokens become fewer from layer to layer (EuroSys '25, section 4.3)."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cacheslide.errors import PolicyError
from cacheslide.policies.deviation import check_ratio, tokens_of_ratio
from cacheslide.policies.layer_selection import LayerSelection


@dataclass(frozen=True)
class GradualFiltering(LayerSelection):
    """From `layer` on, keeps the recomputed tokens whose fresh KV deviates most from the cached one, fewer each layer.

    Layers below `layer` (0-based) are computed in full. At `layer` slightly more than `recompute_ratio` of the reused
    tokens are chosen, at the next layer slightly fewer among these, and so on: `recompute_ratio` is the mean over
    `layer` and all later layers (a receipt counts the last layer's tokens as recomputed). The paper gives no numbers
    for "slightly"; here the ratio falls linearly from (1 + `spread`) to (1 - `spread`) times the mean, with less spread
    if the first would be above 1. At the layer that drops a token its fresh K and V, already computed, are still used;
    later layers use the cached ones.

    Attributes
    ----------
    recompute_ratio : float
        Mean share of the reused tokens, in [0, 1].
    spread : float
        In [0, 1].
    steps : int or None
        Layers at which tokens are dropped, evenly spaced; None is every layer. One step is the authors' public code,
        which has a single check layer.
    metric : str
        The squared distance of values ("v", as in the public code), keys ("k") or both ("kv").
    """

    recompute_ratio: float
    layer: int = 1
    spread: float = 0.25
    steps: int | None = None
    metric: Literal["k", "v", "kv"] = "v"

    def __post_init__(self) -> None:
        check_ratio("recompute_ratio", self.recompute_ratio)
        check_ratio("spread", self.spread)
        if self.layer < 0:
            raise PolicyError(f"layer must be at least 0, not {self.layer}")
        if self.steps is not None and self.steps < 1:
            raise PolicyError(f"steps must be at least 1, not {self.steps}")
        if self.metric not in ("k", "v", "kv"):
            raise PolicyError(f"metric must be 'k', 'v' or 'kv', not {self.metric!r}")

    def ratios(self, layers: int) -> list[float]:
        """Ratios of `layer` and each later layer of a model of `layers` layers; their mean is `recompute_ratio`."""
        n, mean = layers - self.layer, self.recompute_ratio
        slope = min(self.spread * mean, 1 - mean)
        line = [mean + slope * (1 - 2 * i / (n - 1)) if n > 1 else mean for i in range(n)]
        steps = n if self.steps is None else min(self.steps, n)
        groups = [range(-(-s * n // steps), -(-(s + 1) * n // steps)) for s in range(steps)]
        # Mean of a group's ends, equal to its mean on a line: rounding of a sum could exceed the group before.
        return [(line[group[0]] + line[group[-1]]) / 2 for group in groups for _ in group]

    def counts(self, layers: int, reused: int) -> list[int]:
        """Tokens recomputed in `layer` and each later layer, out of `reused`; never increasing."""
        return [tokens_of_ratio(ratio, reused) for ratio in self.ratios(layers)]

    def begin(self, tokens: Any) -> "GradualRun":
        """See `Correction.begin`."""
        return GradualRun(self, tokens)


class GradualRun:
    """One request under `GradualFiltering`, for the duration of its prefill.

    Parameters
    ----------
    rule : GradualFiltering
    tokens : ActiveTokens
        The request's tokens; this object drops some of them from the active set.
    """

    def __init__(self, rule: GradualFiltering, tokens: Any) -> None:
        self.rule, self.tokens = rule, tokens
        counts = rule.counts(tokens.model.num_layers, len(tokens.reused))
        self.counts = dict(enumerate(counts, rule.layer))
        self._behind: tuple[Tensor, Tensor] | None = None  # the resting tokens of the layers after this one

    @property
    def static_from(self) -> int:
        """See `ActiveTokens.static_from`: the layer after the last one that drops a token."""
        last = min(self.counts.values())
        return next(at for at, count in self.counts.items() if count == last) + 1

    def enter(self, layer: int, *states: Tensor) -> tuple[Tensor, ...]:
        """See `CorrectionRun.enter`; `states` are hidden, q, k, v."""
        tokens, reused = self.tokens, self.tokens.reused
        if layer < self.rule.layer:
            return states
        count, before, resting = self.counts[layer], tokens.active, (reused[:0], reused[:0])
        if tokens.selecting:
            candidates = torch.arange(len(reused), device=reused.device)
        else:
            candidates, resting = tokens.chosen, (tokens.resting, tokens.resting_rows)
            if count == len(candidates):
                return states
        at = torch.searchsorted(before, reused[candidates])
        k, v = states[2][at], states[3][at]
        source = tokens.request.source
        scores = tokens.model.reduce_scores(source.deviation(layer, candidates, k, v, self.rule.metric))
        order = torch.sort(scores, descending=True, stable=True).indices  # of equal scores the earlier token stays
        dropped = order[count:].sort().values
        tokens.mask.zero_()
        tokens.mask.index_fill_(0, candidates[order[:count]], True)
        tokens.activate_chosen(count)
        if len(dropped):
            rows = reused[candidates[dropped]] + tokens.request.start
            tokens.request.kv.write(layer, rows, k[dropped], v[dropped])
        self._behind = tokens.resting, tokens.resting_rows
        tokens.resting, tokens.resting_rows = resting  # no cached KV for the dropped ones in this layer
        stays = torch.searchsorted(before, tokens.active)
        return tuple(x[stays] for x in states)

    def leave(self, layer: int, hidden: Tensor) -> Tensor:
        """See `CorrectionRun.leave`: from the next layer on, dropped tokens have cached KV."""
        if self._behind is not None:
            (self.tokens.resting, self.tokens.resting_rows), self._behind = self._behind, None
        return hidden
