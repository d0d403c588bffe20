"""StaticPrefill: the layers in which nothing changes any more, neither the active rows nor what they write.

A rule whose tokens are known before the start runs all of its layers here, one with a selection layer those behind it.
Every layer is the same work on tensors of the same shapes: requests are one packed tensor from the first layer to the
last, and whatever is the same in all layers is made once. A host may replay such layers instead of launching them
(`vllm/worker/graphs.py`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cacheslide.core.active_tokens import ActiveTokens
from cacheslide.models.adapter import DecoderSteps


class StaticPrefill:
    """Runs the static layers of packed requests over the `DecoderSteps` of a model."""

    def __init__(self, model: DecoderSteps) -> None:
        self.model = model

    def run(self, states: Sequence[ActiveTokens], hidden: Tensor, first: int) -> Tensor:
        """Layers `first`, `first` + 1, ... to the last: the KV of every request, and the states behind them.

        Parameters
        ----------
        states : sequence of ActiveTokens
            Static from layer `first` on (`ActiveTokens.static_from`).
        hidden : Tensor [n, hidden_size]
            Their active rows, packed. Used up.

        Returns
        -------
        Tensor [n, hidden_size]
        """
        for state in states:
            state.output.tokens_computed += [len(state.active)] * (self.model.num_layers - first)
        return self._layers(states, hidden, first)

    def _layers(self, states: Sequence[ActiveTokens], hidden: Tensor, first: int) -> Tensor:
        model, groups = self.model, [s.group for s in states]
        positions = packed([s.active_positions for s in states])
        for layer in range(first, model.num_layers):
            q, k, v = model.qkv(layer, hidden, positions)
            place(states, layer)
            if len(hidden):
                model.write(layer, groups, k, v)
                hidden = model.finish(layer, hidden, model.attend(layer, q, groups))
        return hidden


def place(states: Sequence[ActiveTokens], layer: int) -> None:
    """Put the cached KV of every request's resting rows in its place; a source may place more layers at once.

    A layer whose rows have been placed may be asked for again.
    """
    for state in states:
        state.place(layer)


def packed(parts: Sequence[Tensor]) -> Tensor:
    """The requests' rows behind each other; a single request's as they are."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
