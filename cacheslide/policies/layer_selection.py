"""Corrections that select tokens by the deviation of their KV at a layer."""

from dataclasses import replace
from typing import Any, Self

from cacheslide.core.reused import ReusedTokens
from cacheslide.errors import PolicyError
from cacheslide.policies.plain_correction import PlainCorrection


def check_layer(name: str, layer: int, layers: int) -> None:
    """Raise PolicyError, naming the system `name`, if a model of `layers` layers lacks the selection layer `layer`."""
    if layer >= layers:
        raise PolicyError(f"{name} selects at layer {layer}, but the model has layers 0 to {layers - 1}")


class LayerSelection(PlainCorrection):
    """Base class of these corrections, which are dataclasses with `layer` and `recompute_ratio`; it has no fields.

    A subclass adds `begin`.
    """

    layer: int
    recompute_ratio: float

    @property
    def first_layer(self) -> int:
        """See `Correction.first_layer`."""
        return self.layer

    @property
    def selection_layer(self) -> int:
        """See `Correction.selection_layer`."""
        return self.layer

    @property
    def total_ratio(self) -> float:
        """See `Correction.total_ratio`."""
        return self.recompute_ratio

    def check(self, name: str, layers: int) -> None:
        """See `Correction.check`."""
        check_layer(name, max([self.layer, *self.probe_layers]), layers)

    def at_layer(self, layer: int) -> Self:
        """The same rule with selection layer `layer`."""
        return replace(self, layer=layer)

    def at_ratio(self, ratio: float) -> Self:
        """The same rule recomputing `ratio` of the reused tokens."""
        return replace(self, recompute_ratio=ratio)

    def known_before_start(self, reused: ReusedTokens) -> None:
        """None: every token passes the layers up to the selection layer."""

    def choose(self, request: Any, model: Any) -> None:
        """None: every token passes the layers up to the selection layer."""
