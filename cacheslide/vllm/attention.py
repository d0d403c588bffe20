"""Attention of scattered rows over paged KV: our kernel where the layout is open, gathered rows where it is not."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cacheslide import kernels
from cacheslide.model.adapter import RowGroup
from cacheslide.model.reference import row_attention
from cacheslide.vllm.kv_layout import PagedLayer

PagedAttention = Callable[[PagedLayer, int, Tensor, Sequence[RowGroup], float], Tensor]


def gathered(paged: PagedLayer, layer: int, q: Tensor, groups: Sequence[RowGroup], scale: float) -> Tensor:
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
        self._key: tuple | None = None

    def __call__(self, paged: PagedLayer, layer: int, q: Tensor, groups: Sequence[RowGroup], scale: float) -> Tensor:
        """See `gathered`."""
        rows = torch.cat([g.rows for g in groups]).to(torch.int32)
        return kernels.row_attention(q, rows, *self._shared(groups, q.device), paged.cache, scale)

    def _shared(self, groups: Sequence[RowGroup], device: torch.device) -> tuple[Tensor, Tensor]:
        """Row offsets and block table: the same for all layers between two selections, so they are sent once."""
        key = tuple((len(g.rows), g.kv) for g in groups)  # holds the buffers, lest another takes an address
        if key != self._key:
            sizes = torch.tensor([0] + [len(g.rows) for g in groups], dtype=torch.int32)
            cu_rows = sizes.cumsum(0, dtype=torch.int32).to(device)
            table = torch.nn.utils.rnn.pad_sequence([g.kv.table for g in groups], batch_first=True)
            self._key, self._made = key, (cu_rows, table)
        return self._made


def choose(paged: PagedLayer) -> PagedAttention:
    """The attention that fits a layer's cache."""
    return gathered if paged.packed else RowKernel()
