"""SelectivePrefill: the layer loop that turns a prompt with partly cached KV into a complete KV cache.

Layers below the selection layer are computed for every row. At the selection layer the correction chooses
which reused rows stay active; from there on only active rows are computed, and every other row takes its placed
cached KV. All systems of the study are this loop with different settings (docs/architecture.md, section 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from cacheslide.correction import (
    Correction,
    EdgeRows,
    NoCorrection,
    TopDeviation,
    deviation,
    fuse,
    fusion_weight,
    rows_of_share,
    top_rows,
)
from cacheslide.errors import PolicyError
from cacheslide.model.adapter import KVBuffer, ModelAdapter, RowGroup


class KVSource(Protocol):
    """Cached KV of a request's reused rows, already moved to where those rows sit in this prompt."""

    def layer(self, layer: int, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values [n, kv_heads, head_dim] of the reused rows, or of those at `index`."""
        ...

    def inputs(self, layer: int, index: Tensor) -> Tensor | None:
        """Cached layer inputs [n, hidden_size] of the reused rows at `index`; None where they were not kept."""
        ...


@dataclass
class PrefillRequest:
    """One prompt to complete.

    Attributes
    ----------
    token_ids, positions : Tensor [T], int64
        The tokens of rows `start`, `start` + 1, ... and their position indices.
    kv : KVBuffer
        Receives every row's KV. Rows below `start` must already be there.
    reused : Tensor [R], int64
        Ascending local rows (0-based from `start`) with cached KV in `source`.
    chunk_lengths : tuple of int
        Lengths of the reused runs in order; they add up to R (EPIC's edges need them).
    """

    token_ids: Tensor
    positions: Tensor
    kv: KVBuffer
    reused: Tensor
    source: KVSource | None = None
    correction: Correction = field(default_factory=NoCorrection)
    chunk_lengths: tuple[int, ...] = ()
    start: int = 0


@dataclass
class PrefillOutput:
    """What a run leaves beside the KV.

    `hidden` [hidden_size] is the last row's final state, None when that row was not active. `rows_computed[l]`
    counts rows whose attention and MLP ran in layer l, `selected` [S] the reused rows (local) recomputed after
    the last change, `alpha[l]` the mean fusion weight, `layer_inputs[l]` [T, hidden_size] what was captured.
    """

    hidden: Tensor | None
    rows_computed: list[int]
    selected: Tensor
    alpha: dict[int, float]
    layer_inputs: dict[int, Tensor]

    def row_layer_share(self, rows: int) -> float:
        """Share of the prompt's row-layers that were computed: the ideal ratio of prefill times."""
        return sum(self.rows_computed) / (rows * len(self.rows_computed))


class SelectivePrefill:
    """Runs requests, packed, over a `ModelAdapter`."""

    def __init__(self, model: ModelAdapter) -> None:
        self.model = model

    @torch.inference_mode()
    def run(self, requests: Sequence[PrefillRequest], capture: frozenset[int] = frozenset()) -> list[PrefillOutput]:
        """Complete the KV of every request.

        `capture` names layers whose inputs are kept; it asks for runs without reused rows, since an inactive
        row has no layer input to keep.
        """
        model = self.model
        states = [_Rows(r, model) for r in requests]
        if capture and any(len(r.reused) for r in requests):
            raise PolicyError("layer inputs can be captured only from a full prefill")
        hidden = model.embed(_cat([s.request.token_ids[s.active] for s in states]))
        for layer in range(model.num_layers):
            parts = list(hidden.split([len(s.active) for s in states]))
            for s, x in zip(states, parts, strict=True):
                if layer in capture:
                    s.output.layer_inputs[layer] = x
            q, k, v = model.qkv(layer, hidden, _cat([s.active_positions for s in states]))
            sizes = [len(s.active) for s in states]
            entered = [
                s.enter(layer, *tensors)
                for s, *tensors in zip(states, parts, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
            ]
            hidden, q = _cat([e[0] for e in entered]), _cat([e[1] for e in entered])
            if len(hidden):
                attended = model.attend(layer, q, [s.group(s.active) for s in states])
                hidden = model.finish(layer, hidden, attended)
            parts = list(hidden.split([len(s.active) for s in states]))
            hidden = _cat([s.promote(layer, x) for s, x in zip(states, parts, strict=True)])
        parts = hidden.split([len(s.active) for s in states])
        return [s.close(x) for s, x in zip(states, parts, strict=True)]


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Rows:
    """One request's rows during a run: which are active, and how they change from layer to layer."""

    def __init__(self, request: PrefillRequest, model: ModelAdapter) -> None:
        self.request, self.model, self.rule = request, model, request.correction
        rows, device = len(request.token_ids), request.token_ids.device
        self.reused = request.reused
        self.live = torch.ones(rows, dtype=torch.bool, device=device)
        self.live[self.reused] = False
        self.chosen = torch.zeros(len(self.reused), dtype=torch.bool, device=device)  # reused rows now active
        self.output = PrefillOutput(None, [], self.reused[:0], {}, {})
        self.scores: Tensor | None = None  # deviation at the selection layer, of every reused row
        self.alpha: Tensor | None = None  # the paper's fusion weight, carried from layer to layer
        self.stopped: Tensor | None = None  # hidden state of each reused row where it left (for swaps)
        self.selects = isinstance(self.rule, TopDeviation) and len(self.reused) > 0
        if self.selects and self.rule.layer >= model.num_layers:
            raise PolicyError(f"selection layer {self.rule.layer} is beyond the model's {model.num_layers} layers")
        if isinstance(self.rule, EdgeRows):
            self.chosen = _edge_mask(self.rule, request.chunk_lengths, device)
        if self.selects:
            self._activate(torch.arange(rows, device=device))
        else:
            self._activate_chosen()

    def _activate(self, active: Tensor) -> None:
        self.active = active
        self.active_positions = self.request.positions[active]

    def _activate_chosen(self) -> None:
        mask = self.live.clone()
        mask[self.reused] = self.chosen
        self._activate(mask.nonzero()[:, 0])
        self.resting = (~self.chosen).nonzero()[:, 0]  # indices into `reused`

    def group(self, rows: Tensor) -> RowGroup:
        """These local rows as a group of the packed call."""
        return RowGroup(self.request.kv, rows + self.request.start)

    def enter(self, layer: int, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Select, fuse and write this layer's KV; returns hidden and q of the rows that go on."""
        if self.selects and layer < self.rule.layer:
            self._write(layer, self.active, k, v)
        else:
            if self.selects and layer == self.rule.layer:
                hidden, q, k, v = self._select(layer, hidden, q, k, v)
            elif self.selects and self.rule.swap and (layer - self.rule.layer) % self.rule.swap.every == 0:
                hidden, q, k, v = self._swap(layer, hidden, q, k, v)
            if self.selects and self.rule.fusion != "replace":
                k, v = self._fuse(layer, k, v)
            self._write(layer, self.active, k, v)
            if len(self.reused) and len(self.resting):
                self._write(layer, self.reused[self.resting], *self.request.source.layer(layer, self.resting))
        self.output.rows_computed.append(len(self.active))
        return hidden, q

    def _write(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        if len(rows):
            self.request.kv.write(layer, rows + self.request.start, k, v)

    def _score(self, layer: int, index: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Deviation of fresh k, v [n, ...] of the reused rows at `index` [n], summed over ranks."""
        ck, cv = self.request.source.layer(layer, index)
        d = torch.zeros(len(index), device=k.device)
        if "k" in self.rule.metric:
            d = d + deviation(k, ck)
        if "v" in self.rule.metric:
            d = d + deviation(v, cv)
        return self.model.reduce_scores(d)

    def _select(self, layer: int, hidden: Tensor, *qkv: Tensor) -> tuple[Tensor, ...]:
        every = torch.arange(len(self.reused), device=hidden.device)
        self.scores = self._score(layer, every, qkv[1][self.reused], qkv[2][self.reused])
        self.chosen[top_rows(self.scores, rows_of_share(self.rule.share, len(self.reused)))] = True
        if self.rule.swap:
            self.stopped = hidden[self.reused].clone()
        self._activate_chosen()
        return tuple(t[self.active] for t in (hidden, *qkv))

    def _swap(self, layer: int, hidden: Tensor, *qkv: Tensor) -> tuple[Tensor, ...]:
        chosen = self.chosen.nonzero()[:, 0]
        at = torch.searchsorted(self.active, self.reused[chosen])  # where the chosen rows sit among the active
        ck, _ = self.request.source.layer(layer, chosen)
        leaves = self.rule.swap.converged(qkv[1][at], ck)
        leaving, waiting = chosen[leaves], (~self.chosen).nonzero()[:, 0]
        entering = waiting[top_rows(self.scores[waiting], len(leaving))]
        if not len(entering):
            return hidden, *qkv
        self.stopped[leaving] = hidden[at[leaves]]
        cached = self.request.source.inputs(layer, entering)
        fresh = self.stopped[entering] if cached is None else cached.to(hidden.dtype)
        added = self.model.qkv(layer, fresh, self.request.positions[self.reused[entering]])
        stays = torch.ones(len(self.active), dtype=torch.bool, device=hidden.device)
        stays[at[leaves]] = False
        order = torch.cat((self.active[stays], self.reused[entering])).argsort()
        self.chosen[leaving], self.chosen[entering] = False, True
        self._activate_chosen()
        pairs = zip((hidden, *qkv), (fresh, *added), strict=True)
        return tuple(torch.cat((old[stays], new))[order] for old, new in pairs)

    def _fuse(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        chosen = self.chosen.nonzero()[:, 0]
        at = torch.searchsorted(self.active, self.reused[chosen])
        ck, cv = self.request.source.layer(layer, chosen)
        d = self.model.reduce_scores(deviation(k[at], ck))
        alpha = fusion_weight(self.rule.fusion, d, ck, self.rule.constant)
        if self.rule.fusion == "paper":  # Alg. 2 fuses with the weight of the layer before, then updates it
            if self.alpha is None:
                self.alpha = alpha.new_full((len(self.reused),), float("nan"))
            carried = self.alpha[chosen]
            self.alpha[chosen], alpha = alpha, torch.where(carried.isnan(), alpha, carried)
        self.output.alpha[layer] = float(alpha.mean()) if len(alpha) else 0.0
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
        probed = self.model.finish(layer, cached, self.model.attend(layer, q, [self.group(rows)]))
        self.output.rows_computed[layer] += len(rows)
        _, k, v = self.model.qkv(layer + 1, probed, positions)
        scores = self._score(layer + 1, self.resting, k, v)
        new = top_rows(scores, rows_of_share(share, len(self.reused)))
        order = torch.cat((self.active, rows[new])).argsort()
        self.chosen[self.resting[new]] = True
        self._activate_chosen()
        return torch.cat((hidden, probed[new]))[order]

    def close(self, hidden: Tensor) -> PrefillOutput:
        """The request's output after the last layer."""
        self.output.selected = self.reused[self.chosen]
        if len(self.active) and int(self.active[-1]) == len(self.request.token_ids) - 1:
            self.output.hidden = hidden[-1]
        return self.output


def _edge_mask(rule: EdgeRows, lengths: Sequence[int], device: torch.device) -> Tensor:
    """Bool [sum of lengths]: the head and tail rows of every run."""
    parts = []
    for length in lengths:
        head, tail = rule.edges(length)
        at = torch.arange(length, device=device)
        parts.append((at < head) | (at >= length - tail))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool, device=device)
