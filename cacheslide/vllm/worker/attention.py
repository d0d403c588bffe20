"""Attention of scattered rows over paged KV: our kernel where the layout is open, gathered rows where it is not."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cacheslide.core.tensors import send
from cacheslide.kernels import api as kernels
from cacheslide.kernels.cope.api import cope_attention
from cacheslide.models.adapter import RowGroup
from cacheslide.models.attention import row_attention
from cacheslide.positions.ccpe import pack_slots
from cacheslide.vllm.worker.kv_layout import PagedLayer

PagedAttention = Callable[[int, Tensor, Sequence[RowGroup], float], Tensor]


def gathered(layer: int, q: Tensor, groups: Sequence[RowGroup], scale: float) -> Tensor:
    """Read each request's keys out of the cache and attend in plain PyTorch; right for every layout."""
    out = []
    for part, group in zip(q.split([len(g.rows) for g in groups]), groups, strict=True):
        if len(group.rows):
            every = torch.arange(int(group.rows[-1]) + 1, device=q.device)
            out.append(row_attention(part, *group.kv.read(layer, every), group.rows))
    return torch.cat(out)


class RowKernel:
    """All requests in one launch over the paged cache, where keys and values of a slot lie beside each other."""

    def __init__(self) -> None:
        self._groups: tuple[RowGroup, ...] = ()

    def __call__(self, layer: int, q: Tensor, groups: Sequence[RowGroup], scale: float) -> Tensor:
        """See `gathered`."""
        made = self._shared(tuple(groups), q.device)
        return self._launch(layer, q, groups[0].kv.layers[layer].cache, scale, *made)

    def _shared(self, groups: tuple[RowGroup, ...], device: torch.device) -> tuple:
        """What all layers between two selections have in common, so that it is made once."""
        same = len(groups) == len(self._groups) and all(a is b for a, b in zip(groups, self._groups, strict=True))
        if not same:
            self._groups, self._made = groups, self._make(groups, device)
        return self._made

    def _make(self, groups: Sequence[RowGroup], device: torch.device) -> tuple:
        """Rows, offsets and block table."""
        rows = torch.cat([g.rows for g in groups]).to(torch.int32)
        sizes = torch.tensor([0] + [len(g.rows) for g in groups], dtype=torch.int32)
        cu_rows = send(sizes.cumsum(0, dtype=torch.int32), device)
        return rows, cu_rows, torch.nn.utils.rnn.pad_sequence([g.kv.table for g in groups], batch_first=True)

    def _launch(self, layer: int, q: Tensor, cache: Tensor, scale: float, rows, cu_rows, table) -> Tensor:
        return kernels.row_attention(q, rows, cu_rows, table, cache, scale)

    def forget(self) -> None:
        """Let go of the last call's requests."""
        self._groups = ()


class CopeRows(RowKernel):
    """The same with CoPE attention, over position tables and slot offsets that lie in the layers."""

    def __init__(self, paged: Sequence[PagedLayer]) -> None:
        super().__init__()
        self.tables = [p.attention.cope_positions for p in paged]
        self.slot_offsets = paged[0].attention.cope_offsets

    def _make(self, groups: Sequence[RowGroup], device: torch.device) -> tuple:
        packed = pack_slots([(g.kv.updated, g.rows) for g in groups]) if self.slot_offsets.known else None
        return *super()._make(groups, device), packed

    def _launch(self, layer: int, q: Tensor, cache: Tensor, scale: float, rows, cu_rows, table, packed) -> Tensor:
        slots = None if packed is None else packed.with_offsets(self.slot_offsets.offsets[layer], self.slot_offsets.cap)
        return cope_attention(q, rows, cu_rows, table, cache, self.tables[layer], scale, slots=slots)


def choose(paged: Sequence[PagedLayer]) -> PagedAttention:
    """The attention that fits the layers' caches."""
    if paged[0].packed:
        return gathered
    return CopeRows(paged) if hasattr(paged[0].attention, "cope_positions") else RowKernel()
