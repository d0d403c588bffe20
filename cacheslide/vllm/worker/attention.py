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
Launch = Callable[[int, Tensor, Tensor], Tensor]  # layer, its queries, its cache -> what they attend to


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
        launch = self._shared(tuple(groups), q.device, scale)
        return launch(layer, q, groups[0].kv.layers[layer].cache)

    def _shared(self, groups: tuple[RowGroup, ...], device: torch.device, scale: float) -> Launch:
        """The launch that all layers between two selections have in common, so that it is made once."""
        same = len(groups) == len(self._groups) and all(a is b for a, b in zip(groups, self._groups, strict=True))
        if not same:
            self._groups, self._made = groups, self._bind(groups, scale, *packed_rows(groups, device))
        return self._made

    def _bind(self, groups: Sequence[RowGroup], scale: float, rows: Tensor, cu_rows: Tensor, table: Tensor) -> Launch:
        """What attends, for any layer, its queries and its cache."""
        attend = kernels.RowAttention(rows, cu_rows, table, scale)
        return lambda layer, q, cache: attend(q, cache)

    def forget(self) -> None:
        """Let go of the last call's requests."""
        self._groups = ()


class CopeRows(RowKernel):
    """The same with CoPE attention, over position tables and slot offsets that lie in the layers."""

    def __init__(self, paged: Sequence[PagedLayer]) -> None:
        super().__init__()
        self.tables = [p.attention.cope_positions for p in paged]
        self.slot_offsets = paged[0].attention.cope_offsets

    def _bind(self, groups: Sequence[RowGroup], scale: float, rows: Tensor, cu_rows: Tensor, table: Tensor) -> Launch:
        packed = pack_slots([(g.kv.updated, g.rows) for g in groups]) if self.slot_offsets.known else None

        def attend(layer: int, q: Tensor, cache: Tensor) -> Tensor:
            offsets = self.slot_offsets
            slots = None if packed is None else packed.with_offsets(offsets.offsets[layer], offsets.cap)
            return cope_attention(q, rows, cu_rows, table, cache, self.tables[layer], scale, slots=slots)

        return attend


def packed_rows(groups: Sequence[RowGroup], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [n], offsets [requests + 1] and block table [requests, blocks] of packed requests, all int32."""
    rows = torch.cat([g.rows for g in groups]).to(torch.int32)
    return rows, send(offsets(groups), device), table_of(groups)


def offsets(groups: Sequence[RowGroup]) -> Tensor:
    """Where each request's rows begin, and the last one's end: int32 [requests + 1], on the host."""
    return torch.tensor([0, *(len(g.rows) for g in groups)]).cumsum(0, dtype=torch.int32)


def table_of(groups: Sequence[RowGroup]) -> Tensor:
    """The requests' blocks, int32 [requests, blocks]; shorter ones end in zeros."""
    return torch.nn.utils.rnn.pad_sequence([g.kv.table for g in groups], batch_first=True)


def choose(paged: Sequence[PagedLayer]) -> PagedAttention:
    """The attention that fits the layers' caches."""
    if paged[0].packed:
        return gathered
    return CopeRows(paged) if hasattr(paged[0].attention, "cope_positions") else RowKernel()
