"""Attention of scattered rows over paged KV: our kernel where the layout is open, gathered rows where it is not."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cacheslide import kernels
from cacheslide.kernels.cope import cope_attention
from cacheslide.model.adapter import RowGroup
from cacheslide.model.reference import row_attention
from cacheslide.placement import send
from cacheslide.vllm.kv_layout import PagedLayer

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
        shared = self._shared(tuple(groups), q.device)
        return self._launch(layer, q, *shared, groups[0].kv.layers[layer].cache, scale)

    def _launch(
        self, layer: int, q: Tensor, rows: Tensor, cu_rows: Tensor, table: Tensor, cache: Tensor, scale: float
    ) -> Tensor:
        return kernels.row_attention(q, rows, cu_rows, table, cache, scale)

    def _shared(self, groups: tuple[RowGroup, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, offsets and block table: the same for all layers between two selections, so they are made once."""
        same = len(groups) == len(self._groups) and all(a is b for a, b in zip(groups, self._groups, strict=True))
        if not same:
            rows = torch.cat([g.rows for g in groups]).to(torch.int32)
            sizes = torch.tensor([0] + [len(g.rows) for g in groups], dtype=torch.int32)
            cu_rows = send(sizes.cumsum(0, dtype=torch.int32), device)
            table = torch.nn.utils.rnn.pad_sequence([g.kv.table for g in groups], batch_first=True)
            self._groups, self._made = groups, (rows, cu_rows, table)
        return self._made

    def forget(self) -> None:
        """Let go of the last call's requests."""
        self._groups = ()


class CopeRows(RowKernel):
    """The same with CoPE attention; `tables` are the layers' position tables [p_max, head_dim]."""

    def __init__(self, tables: Sequence[Tensor]) -> None:
        super().__init__()
        self.tables = tables

    def _launch(
        self, layer: int, q: Tensor, rows: Tensor, cu_rows: Tensor, table: Tensor, cache: Tensor, scale: float
    ) -> Tensor:
        return cope_attention(q, rows, cu_rows, table, cache, self.tables[layer], scale)


def choose(paged: Sequence[PagedLayer]) -> PagedAttention:
    """The attention that fits the layers' caches."""
    if paged[0].packed:
        return gathered
    tables = [getattr(layer.attention, "cope_positions", None) for layer in paged]
    return RowKernel() if tables[0] is None else CopeRows(tables)
