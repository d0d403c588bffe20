"""A set of recomputed tokens that shrinks with depth: the least deviating tokens have converged and leave."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cacheslide.core.reused import ReusedTokens
from cacheslide.errors import PolicyError
from cacheslide.policies.deviation import check_ratio, tokens_of_ratio, top_rows
from cacheslide.policies.remembered import RememberedDeviation
from cacheslide.policies.static import RatioCorrection


@dataclass(frozen=True)
class ShrinkingTokens(RatioCorrection):
    """Recomputes `recompute_ratio` of the reused tokens from layer 0; every `every` layers half of them leave.

    The first set is that of `RememberedDeviation`. The tokens whose fresh K deviates least from the cached K at a layer
    leave; they have cached KV from that layer on and computed KV below it. The share `floor` of the first set stays to
    the last layer. Each layer's count is known before the request starts, the leaving tokens are not.
    """

    recompute_ratio: float = 0.2
    floor: float = 0.25
    every: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio("floor", self.floor)
        if self.every < 1:
            raise PolicyError(f"every must be at least 1 layer, not {self.every}")

    def count(self, layer: int, first: int) -> int:
        """Tokens recomputed in `layer`, out of `first` in layer 0."""
        return max(first >> (layer // self.every), tokens_of_ratio(self.floor, first))

    def known_before_start(self, reused: ReusedTokens) -> Tensor:
        """Bool [R]: the first set."""
        return RememberedDeviation(self.recompute_ratio).known_before_start(reused)

    @property
    def total_ratio(self) -> float:
        """The ratio at layer 0. A receipt counts the last layer's tokens as recomputed, and computation by layer."""
        return self.recompute_ratio

    @property
    def needs_scores(self) -> bool:
        """See `Correction.needs_scores`."""
        return True

    def begin(self, tokens) -> "ShrinkingRun":
        """See `Correction.begin`."""
        return ShrinkingRun(self, tokens)


class ShrinkingRun:
    """One request under `ShrinkingTokens`, for the duration of its prefill.

    Parameters
    ----------
    rule : ShrinkingTokens
    tokens : ActiveTokens
        The request's tokens, with the first set active.
    """

    def __init__(self, rule: ShrinkingTokens, tokens) -> None:
        self.rule, self.tokens, self.first = rule, tokens, len(tokens.chosen)

    def enter(self, layer: int, *states: Tensor) -> tuple[Tensor, ...]:
        """See `CorrectionRun.enter`; `states` are hidden, q, k, v."""
        tokens, count = self.tokens, self.rule.count(layer, self.first)
        if count >= len(tokens.chosen):
            return states
        before, chosen = tokens.active, tokens.chosen
        at = torch.searchsorted(before, tokens.reused[chosen])
        fresh = states[2][at], states[3][at]
        scores = tokens.model.reduce_scores(tokens.request.source.deviation(layer, chosen, *fresh, "k"))
        tokens.mask.zero_()
        tokens.mask.index_fill_(0, chosen[top_rows(scores, count)], True)
        tokens.activate_chosen(count)
        stays = torch.searchsorted(before, tokens.active)
        return tuple(x[stays] for x in states)

    def leave(self, layer: int, hidden: Tensor) -> Tensor:
        """See `CorrectionRun.leave`."""
        return hidden
