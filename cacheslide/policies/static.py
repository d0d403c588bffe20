"""Corrections whose tokens are known before a request starts, from the lengths of its chunks alone."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


class StaticRun:
    """Nothing happens on the way: the active tokens stay the same from the first layer to the last."""

    def enter(self, layer: int, *states: Tensor) -> tuple[Tensor, ...]:
        """See `CorrectionRun.enter`."""
        return states

    def leave(self, layer: int, hidden: Tensor) -> Tensor:
        """See `CorrectionRun.leave`."""
        return hidden


@dataclass(frozen=True)
class StaticCorrection:
    """What such rules have in common; a rule adds `known_before_start` and `at_ratio`."""

    @property
    def first_layer(self) -> int:
        """Cached KV is read from the first layer on."""
        return 0

    @property
    def selection_layer(self) -> int | None:
        """No layer decides."""
        return None

    @property
    def probe_layers(self) -> frozenset[int]:
        """No layer inputs are needed."""
        return frozenset()

    @property
    def total_ratio(self) -> float | None:
        """The rule names no share."""
        return None

    @property
    def needs_scores(self) -> bool:
        """No score is read."""
        return False

    def check(self, name: str, layers: int) -> None:
        """Every model can run it."""

    def at_layer(self, layer: int):
        """See `Correction.at_layer`."""
        return self

    def choose(self, request: Any, model: Any) -> Tensor | None:
        """Nothing more is asked: the tokens are known before the start."""
        return None

    def begin(self, tokens: Any) -> StaticRun:
        """See `Correction.begin`."""
        return StaticRun()
