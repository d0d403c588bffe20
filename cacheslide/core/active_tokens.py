"""One request's rows during a selective prefill: which of them are active, and how that changes from layer to layer.

In the paper's order: select by deviation, fuse, from there on place cached KV under the rows at rest, swap rows that
have converged (Algorithm 2); and restart further rows from cached layer inputs (promotion).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cacheslide.core.prefill_request import PrefillOutput, PrefillRequest
from cacheslide.errors import PolicyError
from cacheslide.models.adapter import ModelAdapter, RowGroup
from cacheslide.policies.correction import (
    EdgeRows,
    TopDeviation,
    deviation,
    fuse,
    fusion_weight,
    rows_of_share,
    squared_norm,
    top_rows,
)
from cacheslide.quality.similarity import cksim


class ActiveRows:
    """Lives as long as the run; `active` [n] are the local rows that go on into the next layer, ascending."""

    def __init__(self, request: PrefillRequest, model: ModelAdapter) -> None:
        self.request, self.model, self.rule = request, model, request.correction
        rows, device = len(request.token_ids), request.token_ids.device
        self.reused = request.reused
        self.live = torch.ones(rows, dtype=torch.bool, device=device)
        self.live.index_fill_(0, self.reused, False)  # assigning a number would wait for the device
        self.mask = torch.zeros(len(self.reused), dtype=torch.bool, device=device)  # reused rows now active
        self.scores: Tensor | None = None  # deviation at the selection layer, of every reused row
        self.alpha: Tensor | None = None  # the paper's fusion weight, carried from layer to layer
        self.stopped: Tensor | None = None  # hidden state of each reused row at the selection layer (for swaps)
        self.selects = isinstance(self.rule, TopDeviation) and len(self.reused) > 0
        if self.selects and self.rule.layer >= model.num_layers:
            raise PolicyError(f"selection layer {self.rule.layer}: the model has layers 0 to {model.num_layers - 1}")
        count = 0
        if isinstance(self.rule, EdgeRows):
            self.mask, count = _edge_mask(self.rule, request.chunk_lengths, device)
        if self.selects:
            self.chosen = self.reused[:0]
            self._activate(torch.arange(rows, device=device))
        else:
            self._activate_chosen(count)
        self.output = PrefillOutput(rows, [], self.reused[:0], {}, {}, self.active)

    def _activate(self, active: Tensor) -> None:
        self.active = active
        self.active_positions = self.request.positions[active]
        self.group = RowGroup(self.request.kv, active + self.request.start)

    def _activate_chosen(self, count: int) -> None:
        """The live rows and the `count` reused rows set in `mask` become the active ones."""
        everyone = self.live.clone()
        everyone[self.reused] = self.mask
        self._activate(_where(everyone, len(everyone) - len(self.reused) + count))
        self.chosen = _where(self.mask, count)  # indices into `reused`
        self.resting = _where(~self.mask, len(self.mask) - count)  # likewise
        self.resting_rows = self.reused[self.resting] + self.request.start

    def enter(self, layer: int, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Select, fuse and write this layer's KV; returns hidden and q of the rows that go on."""
        if self.selects and layer < self.rule.layer:
            self._write(layer, k, v)
        else:
            if self.selects and layer == self.rule.layer:
                hidden, q, k, v = self._select(layer, hidden, q, k, v)
            elif self.selects and self.rule.swap and (layer - self.rule.layer) % self.rule.swap.every == 0:
                hidden, q, k, v = self._swap(layer, hidden, q, k, v)
            if self.selects and self.rule.fusion != "replace":
                k, v = self._fuse(layer, k, v)
            if len(self.reused) and len(self.resting):
                self.request.source.place(layer, self.resting, self.request.kv, self.resting_rows)
            self._write(layer, k, v)
        self.output.rows_computed.append(len(self.active))
        return hidden, q

    def _write(self, layer: int, k: Tensor, v: Tensor) -> None:
        if len(k):
            self.request.kv.write(layer, self.group.rows, k, v)

    def _score(self, layer: int, index: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Deviation of fresh k, v [n, ...] of the reused rows at `index` [n], summed over ranks."""
        return self.model.reduce_scores(self.request.source.deviation(layer, index, k, v, self.rule.metric))

    def _select(self, layer: int, hidden: Tensor, *qkv: Tensor) -> tuple[Tensor, ...]:
        every = torch.arange(len(self.reused), device=hidden.device)
        self.scores = self._score(layer, every, qkv[1][self.reused], qkv[2][self.reused])
        count = rows_of_share(self.rule.share, len(self.reused))
        self.mask.index_fill_(0, top_rows(self.scores, count), True)
        if self.rule.swap:
            self.stopped = hidden[self.reused].clone()
            self.left = torch.zeros_like(self.mask)  # rows that have converged: no longer in Alg. 2's S
        self._activate_chosen(count)
        return tuple(t[self.active] for t in (hidden, *qkv))

    def _swap(self, layer: int, hidden: Tensor, *qkv: Tensor) -> tuple[Tensor, ...]:
        chosen = self.chosen
        at = torch.searchsorted(self.active, self.reused[chosen])  # where the chosen rows sit among the active
        ck, _ = self.request.source.layer(layer, chosen)
        alike = self.model.reduce_scores(cksim(qkv[1][at], ck)) / self.model.ranks
        leaves = self.rule.swap.converged(alike)
        leaving, waiting = chosen[leaves], self.resting[~self.left[self.resting]]
        if not len(leaving):
            return hidden, *qkv
        entering = waiting[top_rows(self.scores[waiting], len(leaving))]
        fresh = self.stopped[entering]
        if self.rule.swap.start == "inputs":
            cached = self.request.source.inputs(layer, entering)
            if cached is None:
                raise PolicyError(f"a swap at layer {layer} from cached layer inputs, but the chunks hold none")
            fresh = cached.to(hidden.dtype)
        positions = self.request.positions[self.reused[entering]]
        added = self.model.qkv(layer, fresh, positions) if len(entering) else [t[:0] for t in qkv]
        stays = torch.ones(len(self.active), dtype=torch.bool, device=hidden.device)
        stays[at[leaves]] = False
        order = torch.cat((self.active[stays], self.reused[entering])).argsort()
        self.mask[leaving], self.mask[entering], self.left[leaving] = False, True, True
        self._activate_chosen(len(chosen) - len(leaving) + len(entering))
        pairs = zip((hidden, *qkv), (fresh, *added), strict=True)
        return tuple(torch.cat((old[stays], new))[order] for old, new in pairs)

    def _fuse(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        at = torch.searchsorted(self.active, self.reused[self.chosen])
        ck, cv = self.request.source.layer(layer, self.chosen)
        d = self.model.reduce_scores(deviation(k[at], ck))
        size = self.model.reduce_scores(squared_norm(ck))
        alpha = fusion_weight(self.rule.fusion, d, size, self.rule.constant)
        if self.rule.fusion == "paper":  # Alg. 2 fuses with the weight of the layer before, then updates it
            if self.alpha is None:
                self.alpha = alpha.new_full((len(self.reused),), float("nan"))
            carried = self.alpha[self.chosen]
            self.alpha[self.chosen], alpha = alpha, torch.where(carried.isnan(), alpha, carried)
        self.output.alpha[layer] = alpha.mean() if len(alpha) else alpha.new_zeros(())
        k, v = k.clone(), v.clone()
        k[at], v[at] = fuse(k[at], ck, alpha), fuse(v[at], cv, alpha)
        return k, v

    def promote(self, layer: int, hidden: Tensor) -> Tensor:
        """After `layer`: restart resting rows from their cached layer inputs and keep the most deviating ones."""
        share = {p.layer: p.share for p in self.rule.promote}.get(layer) if self.selects else None
        if share is None or layer + 1 >= self.model.num_layers or not len(self.resting):
            return hidden
        cached = self.request.source.inputs(layer, self.resting)
        if cached is None:
            raise PolicyError(f"promotion at layer {layer} needs cached layer inputs, but the chunks hold none")
        rows = self.reused[self.resting]
        positions = self.request.positions[rows]
        cached = cached.to(hidden.dtype)
        q, _, _ = self.model.qkv(layer, cached, positions)
        group = RowGroup(self.request.kv, self.resting_rows)
        probed = self.model.finish(layer, cached, self.model.attend(layer, q, [group]))
        self.output.rows_computed[layer] += len(rows)
        _, k, v = self.model.qkv(layer + 1, probed, positions)
        scores = self._score(layer + 1, self.resting, k, v)
        new = top_rows(scores, rows_of_share(share, len(self.reused)))
        order = torch.cat((self.active, rows[new])).argsort()
        self.mask.index_fill_(0, self.resting[new], True)
        self._activate_chosen(len(self.chosen) + len(new))
        return torch.cat((hidden, probed[new]))[order]

    def close(self, hidden: Tensor) -> PrefillOutput:
        """The request's output after the last layer."""
        output = self.output
        output.selected, output.active, output.final = self.reused[self.chosen], self.active, hidden
        if output.alpha:
            output.alpha = dict(zip(output.alpha, torch.stack(list(output.alpha.values())).tolist(), strict=True))
        return output


def _edge_mask(rule: EdgeRows, lengths: Sequence[int], device: torch.device) -> tuple[Tensor, int]:
    """Bool [sum of lengths]: the head and tail rows of every run; and how many they are."""
    parts = [torch.zeros(0, dtype=torch.bool)]
    for length in lengths:
        head, tail = rule.edges(length)
        at = torch.arange(length)
        parts.append((at < head) | (at >= length - tail))
    mask = torch.cat(parts)
    return mask.to(device), int(mask.sum())


def _where(mask: Tensor, count: int) -> Tensor:
    """Ascending indices of the `count` set entries of `mask`; unlike `nonzero` it does not wait for the device."""
    return mask.to(torch.uint8).sort(descending=True, stable=True).indices[:count]
