"""Cached rows placed into a GPU's paged cache by the fused kernel, without intermediate tensors."""

from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise

import torch
from torch import Tensor

from cacheslide.core.placement import Piece, PlacedChunks, Placement
from cacheslide.kernels import api as kernels
from cacheslide.models.adapter import KVBuffer
from cacheslide.positions.rope import Rotary
from cacheslide.vllm.worker.kv_layout import PagedKV, PagedLayer, addresses
from cacheslide.vllm.worker.prefetch import LayerFetch, Parts


class Caches:
    """The layers' paged caches with their addresses; updated only when vLLM has moved them."""

    def __init__(self, layers: Sequence[PagedLayer]) -> None:
        self.layers = layers
        self._at: tuple[int, ...] = ()

    def get(self) -> tuple[list[Tensor], Tensor | None]:
        """The caches and their addresses (None on a CPU)."""
        caches, at = [layer.cache for layer in self.layers], addresses(self.layers)
        if at != self._at:
            self._at = at
            self._pointers = kernels.cache_pointers(caches) if caches[0].is_cuda else None
        return caches, self._pointers


class PagedChunks(PlacedChunks):
    """A `KVSource` that writes rows directly into a paged cache of the open layout.

    Parameters
    ----------
    caches : Caches
    fetch : LayerFetch, optional
        Fetches chunks from host memory, layer by layer. Without it they are on the cache's device.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        target: Tensor,
        placement: Placement,
        rotaries: Sequence[Rotary],
        dtype: torch.dtype,
        shift: int,
        device: torch.device,
        caches: Caches,
        fetch: LayerFetch | None = None,
    ) -> None:
        super().__init__(pieces, target, placement, rotaries, dtype, shift, device)
        self.turns = None if self.deltas is None else self.deltas.to(torch.int32)
        self.caches, self.pointers = caches.get()
        self.fetch = fetch
        ends = list(accumulate((p.length for p in pieces), initial=0))
        self.spans, self.rows = [slice(a, b) for a, b in pairwise(ends)], ends[-1]
        self._index: Tensor | None = None  # the rows placed last,
        self._slots: Tensor | None = None  # their slots,
        self._placed = 0  # and the first layer in which they are not placed

    def place(self, layer: int, index: Tensor, kv: KVBuffer, rows: Tensor) -> None:
        """See `KVSource.place`. Chunks on the device are placed at once in all layers from `layer` on."""
        if not isinstance(kv, PagedKV):
            super().place(layer, index, kv, rows)
            return
        if index is not self._index:
            self._index, self._placed = index, layer
            self._slots = torch.full((self.rows,), -1, dtype=torch.int64, device=self.device)
            self._slots[index] = kv.slots[rows]
        if layer >= self._placed:
            self._placed, parts = self._parts(layer)
            for (k, v), span in zip(parts, self.spans, strict=True):
                self._launch(k, v, span, layer)

    def _parts(self, layer: int) -> tuple[int, Parts]:
        """Keys and values [layers, rows, ...] of every piece in layers [layer, end), and `end`."""
        if self.fetch is not None:
            return self.fetch.group(layer)
        held = [(p.chunk.k[layer:, p.rows], p.chunk.v[layer:, p.rows]) for p in self.pieces]
        return len(self.caches), held

    def _launch(self, k: Tensor, v: Tensor, span: slice, layer: int) -> None:
        """One launch per sequence of layers with the same rotation."""
        turns, first = None if self.turns is None else self.turns[span], layer
        for _, layers_of in groupby(self.rotaries[layer : layer + len(k)], id):
            end = first + len(list(layers_of))
            layers, held = slice(first, end), slice(first - layer, end - layer)
            pointers = None if self.pointers is None else self.pointers[layers]
            rotary, caches = self.rotaries[first], self.caches[layers]
            kernels.place_layers(k[held], v[held], self._slots[span], turns, caches, rotary, pointers)
            first = end

    def deviation(self, layer: int, index: Tensor, k: Tensor, v: Tensor, metric: str) -> Tensor:
        """See `KVSource.deviation`."""
        if len(index) != self.rows:
            return super().deviation(layer, index, k, v, metric)
        parts = [self._deviation(layer, fresh, name) for name, fresh in (("k", k), ("v", v)) if name in metric]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _deviation(self, layer: int, fresh: Tensor, name: str) -> Tensor:
        """Deviation of all rows; only keys are rotated."""
        turns, parts = self.turns if name == "k" else None, []
        for pair, span in zip(self._parts(layer)[1], self.spans, strict=True):
            cached, by = pair["kv".index(name)][0], None if turns is None else turns[span]
            parts.append(kernels.row_deviation(fresh[span], cached, by, self.rotaries[layer]))
        return torch.cat(parts)
