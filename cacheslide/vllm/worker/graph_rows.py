"""Device tensors at fixed addresses that hold a run's rows, padded to one of a few sizes: inputs of captured layers.

Padding must not have effects: padded rows write to slot -1, which the cache's kernel skips, and belong to no request,
so attention reads nothing for them. Their values stay finite, since a quantised projection may scale all rows by their
largest number.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cacheslide.core.tensors import send
from cacheslide.models.adapter import RowGroup
from cacheslide.vllm.worker.attention import Room, offsets, table_of

MOST_ROWS = 4096  # above this the device takes longer than the host needs to launch its work
REQUESTS = (1, 8, 64)
# Row counts at which the matrix products of a 7B shape fill the device (docs/performance.md): 448 rows take longer than
# 512, 832 longer than 896.
ROWS = (64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 432, 512, 640, 768, 816)
ROWS += (*range(896, 1537, 128), 1632, 1792, 1920, *range(2048, MOST_ROWS + 1, 256))
NOBODY = -(2**30)  # row index of a query that attends to nothing
_LEAST_BLOCKS = 16


@dataclass(frozen=True)
class Size:
    """Capacity for `rows` rows of `requests` requests with `blocks` table entries; see `RowKernel.variant`."""

    rows: int
    requests: int
    blocks: int
    variant: str = ""


def size_for(rows: int, requests: int, blocks: int, most_blocks: int, variant: str = "") -> Size | None:
    """The smallest size that holds a run; None if none does.

    Rows are rounded up to one of `ROWS`: above 64 by at most a quarter, since padding is computed. The table's width
    bounds a request's keys and so the tiling of attention: it is rounded up by at most a half.
    """
    if not 0 < rows <= MOST_ROWS or requests > REQUESTS[-1] or blocks > most_blocks:
        return None
    wide = min(_rounded(blocks, _LEAST_BLOCKS, 2), most_blocks)
    return Size(ROWS[bisect_left(ROWS, rows)], next(n for n in REQUESTS if n >= requests), wide, variant)


def _rounded(count: int, least: int, parts: int) -> int:
    """The smallest of least * 2^k * (1 + i / parts), i < parts, that is at least `count`."""
    base = least
    while 2 * base < count:
        base *= 2
    step = base // parts
    return max(base, -(-count // step) * step)


@dataclass
class StaticRows:
    """The tensors; `make` allocates them for the largest size, `at` returns those of one size in the same memory.

    Attributes
    ----------
    hidden : Tensor [rows, hidden_size]
        Input of a layer, overwritten by its output.
    positions, slots : Tensor [rows], int64
        Position indices, and slots in the paged cache; -1 for padding.
    attended : Tensor [rows, heads, head_dim]
        Output of attention; for padding 0, or a real row's earlier value.
    rows : Tensor [rows], int32
        Row indices; `NOBODY` for padding.
    cu_rows : Tensor [requests + 1], int32
    table : Tensor [requests, blocks], int32
        As in `kernels.row_attention`.
    extras : Room or None
        Further inputs of this model's attention; None for variants without any.
    size : Size or None
        Size of these tensors.
    """

    hidden: Tensor
    attended: Tensor
    positions: Tensor
    slots: Tensor
    rows: Tensor
    cu_rows: Tensor
    table: Tensor
    extras: Room | None = None
    size: Size | None = None

    @classmethod
    def make(cls, model, blocks: int) -> "StaticRows":
        """Tensors of a `VllmModel` for every size with tables of up to `blocks` entries."""
        most, requests, to = MOST_ROWS, REQUESTS[-1], {"device": model.device}
        return cls(
            torch.zeros(most, model.hidden_size, dtype=model.dtype, **to),
            torch.zeros(most, model.num_heads, model.head_dim, dtype=model.dtype, **to),
            torch.zeros(most, dtype=torch.int64, **to),
            torch.full((most,), -1, dtype=torch.int64, **to),
            torch.full((most,), NOBODY, dtype=torch.int32, **to),
            torch.zeros(requests + 1, dtype=torch.int32, **to),
            torch.zeros(requests, blocks, dtype=torch.int32, **to),
            model.attend_paged.room(most, requests, model.device),
        )

    def at(self, size: Size) -> "StaticRows":
        """The tensors of `size`."""
        n = size.rows
        of_rows = {name: getattr(self, name)[:n] for name in ("hidden", "attended", "positions", "slots", "rows")}
        cu_rows, table = self.cu_rows[: size.requests + 1], self.table[: size.requests, : size.blocks]
        extras = self.extras.at(n, size.requests) if size.variant else None
        return replace(self, **of_rows, cu_rows=cu_rows, table=table, extras=extras, size=size)

    def clear(self) -> None:
        """Fill with padding: a layer run over it changes nothing but `hidden`."""
        for x in (self.hidden, self.attended, self.positions, self.cu_rows, self.table):
            x.zero_()
        self.slots.fill_(-1)
        self.rows.fill_(NOBODY)
        if self.extras is not None:
            self.extras.clear()

    def fill(self, hidden: Tensor, positions: Tensor, groups: Sequence[RowGroup]) -> None:
        """Copy in packed rows, hidden [n, hidden_size] and positions [n], of requests in the paged cache.

        Only the requests' offsets are copied from the host.
        """
        n, table = len(hidden), table_of(groups)
        rows, slots = torch.cat([g.rows for g in groups]), torch.cat([g.kv.slots[g.rows] for g in groups])
        taken = (self.hidden, hidden, 0), (self.positions, positions, 0), (self.slots, slots, -1)
        for to, x, padding in (*taken, (self.rows, rows, NOBODY)):
            to[:n].copy_(x)
            to[n:].fill_(padding)
        ends = torch.full((len(self.cu_rows),), n, dtype=torch.int32)
        ends[: len(groups) + 1] = offsets(groups)
        self.cu_rows.copy_(send(ends, self.cu_rows.device))
        self.table[: len(groups), : table.shape[1]].copy_(table)
        if self.extras is not None:
            self.extras.fill(groups)
