"""StaticPrefill: the layers in which neither the active rows nor their writes change any more.

These are all layers of a rule whose tokens are known before the start, and the layers behind the last selection of
other rules. Every layer does the same work on tensors of the same shapes: requests are one packed tensor throughout,
and whatever is the same in all layers is made once. A host may replay such layers from a CUDA graph
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
        """Run layers `first` to the last: writes the KV of every request and returns the final states.

        Parameters
        ----------
        states : sequence of ActiveTokens
            Static from layer `first` on (`ActiveTokens.static_from`).
        hidden : Tensor [n, hidden_size]
            Their active rows, packed. Overwritten.

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
    """Write one layer's cached KV into every request's resting rows; a source may place later layers in the same call.

    May be called again for a layer already placed.
    """
    for state in states:
        state.place(layer)


def packed(parts: Sequence[Tensor]) -> Tensor:
    """The requests' rows concatenated; a single request's tensor as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
