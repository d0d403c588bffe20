"""The active tokens of one request during a selective prefill, and how the set changes from layer to layer.

The correction (`policies/`) decides what changes; this file keeps the set, writes the KV of active tokens and places
cached KV in the rows of resting ones.
"""

from functools import cached_property

import torch
from torch import Tensor

from cacheslide.core.prefill_request import PrefillOutput, PrefillRequest
from cacheslide.core.tensors import send, send_together
from cacheslide.models.adapter import DecoderSteps, RowGroup


class ActiveTokens:
    """State of one request for the length of one run.

    Attributes
    ----------
    active : Tensor [n]
        Local rows that go on into the next layer, ascending.
    reused : Tensor [R]
        Local rows with cached KV, ascending.
    mask : Tensor [R], bool
        Which reused rows are active; `chosen` and `resting` are their indices into `reused`.
    selecting : bool
        Whether the correction has not chosen yet: until then every row is active and no cached KV is placed.
    """

    def __init__(self, request: PrefillRequest, model: DecoderSteps) -> None:
        self.request, self.model = request, model
        rows = len(request.token_ids)
        self.reused = request.reused
        self.chosen = self.reused[:0]
        self.selecting = False
        rule = request.correction
        if len(self.reused):
            rule.check("the correction", model.num_layers)
            self._begin(known=rule.known_before_start(request.runs))
        else:
            self.mask = self._nothing()
            self.activate_chosen(0)
        self.output = PrefillOutput(rows, [], self.reused[:0], {}, {}, self.active)
        self.run = rule.begin(self) if len(self.reused) else None

    @cached_property
    def live(self) -> Tensor:
        """Bool [T]: local rows without cached KV."""
        live = torch.ones(len(self.request.token_ids), dtype=torch.bool, device=self.reused.device)
        return live.index_fill_(0, self.reused, False)  # assigning a number would wait for the device

    def _nothing(self) -> Tensor:
        """Bool [R]: no reused row is set."""
        return torch.zeros(len(self.reused), dtype=torch.bool, device=self.reused.device)

    def _begin(self, known: Tensor | None) -> None:
        """Make the first rows active; `known` [R], on the host, is the correction's mask, None if it has none yet."""
        request = self.request
        if known is not None:
            self._activate_known(known)
            return
        self.mask = self._nothing()
        if (chosen := request.correction.choose(request, self.model)) is not None:
            self.mask.index_fill_(0, chosen, True)
            self.activate_chosen(len(chosen))
        else:
            self.selecting = True
            active = torch.arange(len(request.token_ids), device=self.reused.device)
            self._activate(active, active + request.start)

    def _activate(self, active: Tensor, at: Tensor) -> None:
        """Local rows `active`, which are rows `at` of the request's KV."""
        self.active = active
        self.active_positions = self.request.positions[active]
        self.group = RowGroup(self.request.kv, at)

    def _activate_known(self, known: Tensor) -> None:
        """As `activate_chosen`, from a mask on the host: the indices are computed on the host and sent in one copy.

        On the device the same takes about thirty launches, each slower to issue than to run.
        """
        request, rows = self.request, self.request.runs.rows
        self.mask = send(known, self.reused.device)
        active_mask = torch.ones(len(request.token_ids), dtype=torch.bool)
        active_mask[rows] = known
        active, chosen, resting = (mask.nonzero()[:, 0] for mask in (active_mask, known, ~known))
        parts = active, active + request.start, chosen, resting, rows[resting] + request.start
        active, at, self.chosen, self.resting, self.resting_rows = send_together(parts, self.reused.device)
        self._activate(active, at)

    def activate_chosen(self, count: int) -> None:
        """Make the live rows and the `count` reused rows set in `mask` active."""
        self.selecting = False
        active_mask = self.live.clone()
        active_mask[self.reused] = self.mask
        active = _where(active_mask, len(active_mask) - len(self.reused) + count)
        self._activate(active, active + self.request.start)
        self.chosen = _where(self.mask, count)  # indices into `reused`
        self.resting = _where(~self.mask, len(self.mask) - count)  # likewise
        self.resting_rows = self.reused[self.resting] + self.request.start

    def narrow_chosen(self) -> None:
        """Until the set changes, recomputed tokens attend only to computed rows (updated text) and to themselves."""
        computed = _where(self.live, len(self.live) - len(self.reused)) + self.request.start
        self.group = RowGroup(self.request.kv, self.group.rows, ~self.live[self.active], computed)

    @property
    def static_from(self) -> int:
        """First layer from which the correction changes nothing; the number of layers if it may act in any.

        Read from the run's optional attribute `static_from`.
        """
        if self.run is None:
            return 0
        layer = getattr(self.run, "static_from", None)
        return self.model.num_layers if layer is None or self.selecting else layer

    def place(self, layer: int) -> None:
        """Write this layer's cached KV under the resting rows."""
        if self.run is not None and not self.selecting and len(self.resting):
            self.request.source.place(layer, self.resting, self.request.kv, self.resting_rows)

    def enter(self, layer: int, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Run the correction and write this layer's KV; returns hidden and q of the rows that go on."""
        if self.run is not None:
            hidden, q, k, v = self.run.enter(layer, hidden, q, k, v)
            self.place(layer)
        if len(k):
            self.request.kv.write(layer, self.group.rows, k, v)
        self.output.tokens_computed.append(len(self.active))
        return hidden, q

    def leave(self, layer: int, hidden: Tensor) -> Tensor:
        """Hidden states of the rows that go on into the layer after `layer`."""
        return hidden if self.run is None else self.run.leave(layer, hidden)

    def close(self, hidden: Tensor) -> PrefillOutput:
        """The request's output after the last layer."""
        output = self.output
        output.selected, output.active, output.final = self.reused[self.chosen], self.active, hidden
        if output.alpha:
            output.alpha = dict(zip(output.alpha, torch.stack(list(output.alpha.values())).tolist(), strict=True))
        return output


def _where(mask: Tensor, count: int) -> Tensor:
    """Ascending indices of the `count` set entries of `mask`; unlike `nonzero` it does not wait for the device."""
    return mask.to(torch.uint8).sort(descending=True, stable=True).indices[:count]
