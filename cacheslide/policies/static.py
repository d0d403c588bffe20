"""Corrections whose tokens are known before a request starts."""

from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor

from cacheslide.policies.deviation import check_ratio
from cacheslide.policies.plain_correction import PlainCorrection


class StaticRun:
    """The active tokens stay the same from the first layer to the last."""

    static_from: int | None = 0  # see `ActiveTokens.static_from`; overridden by subclasses that act at a layer

    def enter(self, layer: int, *states: Tensor) -> tuple[Tensor, ...]:
        """See `CorrectionRun.enter`."""
        return states

    def leave(self, layer: int, hidden: Tensor) -> Tensor:
        """See `CorrectionRun.leave`."""
        return hidden


@dataclass(frozen=True)
class StaticCorrection(PlainCorrection):
    """Base class of these corrections; a subclass adds `known_before_start` and `at_ratio`."""

    @property
    def first_layer(self) -> int:
        """Cached KV is read from the first layer on."""
        return 0

    @property
    def selection_layer(self) -> int | None:
        """No selection layer."""
        return None

    @property
    def total_ratio(self) -> float | None:
        """No fixed share."""
        return None

    def check(self, name: str, layers: int) -> None:
        """Every model can run it."""

    def at_layer(self, layer: int):
        """See `Correction.at_layer`."""
        return self

    def choose(self, request: Any, model: Any) -> Tensor | None:
        """None: the tokens are known before the start."""
        return None

    def begin(self, tokens: Any) -> StaticRun:
        """See `Correction.begin`."""
        return StaticRun()


@dataclass(frozen=True)
class RatioCorrection(StaticCorrection):
    """A static correction that recomputes a share of the reused tokens; a subclass adds `known_before_start`.

    Attributes
    ----------
    recompute_ratio : float
        In [0, 1]; PolicyError outside of it.
    """

    recompute_ratio: float = 0.1

    def __post_init__(self) -> None:
        check_ratio("recompute_ratio", self.recompute_ratio)

    def at_ratio(self, ratio: float) -> Self:
        """The same rule recomputing `ratio` of the reused tokens."""
        return replace(self, recompute_ratio=ratio)

    @property
    def total_ratio(self) -> float:
        """See `Correction.total_ratio`."""
        return self.recompute_ratio
