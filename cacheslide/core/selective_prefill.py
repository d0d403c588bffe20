"""SelectivePrefill: the layer loop that turns a prompt with partly cached KV into a complete KV cache.

Layers below the selection layer are computed for every row. At the selection layer the correction chooses which
reused rows stay active; above it only active rows are computed, and every other row takes its placed cached KV. All
systems of the study are this loop with different settings (docs/architecture.md, section 1). Once no request's rows
change any more, `StaticPrefill` runs the remaining layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cacheslide.core.active_tokens import ActiveTokens
from cacheslide.core.prefill_request import PrefillOutput, PrefillRequest
from cacheslide.core.static_prefill import StaticPrefill, packed
from cacheslide.errors import PolicyError
from cacheslide.models.adapter import DecoderSteps


class SelectivePrefill:
    """Runs requests, packed, over the `DecoderSteps` of a model.

    Parameters
    ----------
    model : DecoderSteps
    static : StaticPrefill, optional
        Runs the layers in which nothing changes; a `StaticPrefill(model)` by default.
    """

    def __init__(self, model: DecoderSteps, static: StaticPrefill | None = None) -> None:
        self.model = model
        self.static = StaticPrefill(model) if static is None else static

    @torch.inference_mode()
    def run(self, requests: Sequence[PrefillRequest], capture: frozenset[int] = frozenset()) -> list[PrefillOutput]:
        """Complete the KV of every request.

        `capture` names layers whose inputs are stored; it requires requests without reused rows, since an inactive row
        has no layer input. Nothing here waits for the device, unless a policy swaps rows.
        """
        model = self.model
        states = [ActiveTokens(r, model) for r in requests]
        if capture and any(len(r.reused) for r in requests):
            raise PolicyError("layer inputs can be captured only from a full prefill")
        hidden = model.embed(packed([s.request.token_ids[s.active] for s in states]))
        for layer in range(model.num_layers):
            if not capture and all(s.static_from <= layer for s in states):
                hidden = self.static.run(states, hidden, layer)
                break
            sizes = [len(s.active) for s in states]
            parts = hidden.split(sizes)
            if layer in capture:
                for s, x in zip(states, parts, strict=True):
                    s.output.layer_inputs[layer] = x.clone()  # `finish` may overwrite its input
            q, k, v = model.qkv(layer, hidden, packed([s.active_positions for s in states]))
            rows = zip(states, parts, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
            entered = [s.enter(layer, *tensors) for s, *tensors in rows]
            hidden, q = _joined(hidden, parts, [e[0] for e in entered]), _joined(q, (), [e[1] for e in entered])
            if len(hidden):
                attended = model.attend(layer, q, [s.group for s in states])
                hidden = model.finish(layer, hidden, attended)
            parts = hidden.split([len(s.active) for s in states])
            hidden = _joined(hidden, parts, [s.leave(layer, x) for s, x in zip(states, parts, strict=True)])
        parts = hidden.split([len(s.active) for s in states])
        return [s.close(x) for s, x in zip(states, parts, strict=True)]


def _joined(packed_before: Tensor, before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """The parts `after` as one tensor: `packed_before` itself when its parts `before` are unchanged."""
    unchanged = len(before) == len(after) and all(a is b for a, b in zip(before, after, strict=True))
    return packed_before if unchanged else packed(after)
