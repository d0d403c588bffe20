"""Attention of scattered rows over paged KV: our kernel where the layout is open, gathered rows where it is not."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from cacheslide.core.tensors import send
from cacheslide.kernels import api as kernels
from cacheslide.models.adapter import RowGroup
from cacheslide.models.attention import row_attention

PagedAttention = Callable[[int, Tensor, Sequence[RowGroup], float], Tensor]
# layer, its queries, its cache, memory for the result -> what they attend to
Launch = Callable[[int, Tensor, Tensor, Tensor | None], Tensor]


def gathered(layer: int, q: Tensor, groups: Sequence[RowGroup], scale: float) -> Tensor:
    """Read each request's keys out of the cache and attend in plain PyTorch; right for every layout."""
    out = []
    for part, group in zip(q.split([len(g.rows) for g in groups]), groups, strict=True):
        if len(group.rows):
            every = torch.arange(int(group.rows[-1]) + 1, device=q.device)
            out.append(row_attention(part, *group.kv.read(layer, every), group.rows))
    return torch.cat(out)


class Room(Protocol):
    """Memory of fixed addresses for what an attention takes beside rows; padding in it changes no row."""

    def at(self, rows: int, requests: int) -> "Room":
        """Its first part, for `rows` rows of `requests` requests, in the same memory."""
        ...

    def clear(self) -> None:
        """Padding only."""
        ...

    def fill(self, groups: Sequence[RowGroup]) -> None:
        """Take in what a run's requests bring; everything behind them becomes padding."""
        ...


class RowKernel:
    """All requests in one launch over the paged cache, where keys and values of a slot lie beside each other.

    An attention that takes more than rows is a class of its own on top of this one (`cope_rows.py`): `extras` are a
    run's, `launch` attends with them, and `room` holds them for recorded layers.
    """

    def __init__(self) -> None:
        self._groups: tuple[RowGroup, ...] = ()

    def __call__(self, layer: int, q: Tensor, groups: Sequence[RowGroup], scale: float) -> Tensor:
        """See `gathered`."""
        launch = self._shared(tuple(groups), q.device, scale)
        return launch(layer, q, groups[0].kv.layers[layer].cache, None)

    def _shared(self, groups: tuple[RowGroup, ...], device: torch.device, scale: float) -> Launch:
        """The launch that all layers between two selections have in common, so that it is made once."""
        same = len(groups) == len(self._groups) and all(a is b for a, b in zip(groups, self._groups, strict=True))
        if not same:
            rows = packed_rows(groups, device)
            self._groups, self._made = groups, self.launch(*rows, scale, self.extras(groups))
        return self._made

    def extras(self, groups: Sequence[RowGroup]) -> Any:
        """What attention of these requests takes beside their rows; None for nothing."""
        return None

    def launch(self, rows: Tensor, cu_rows: Tensor, table: Tensor, scale: float, extras: Any = None) -> Launch:
        """What attends in any layer, for rows as `kernels.row_attention` takes them and their `extras` or `Room`."""
        attend = kernels.RowAttention(rows, cu_rows, table, scale)
        return lambda layer, q, cache, out: attend(q, cache, out)

    def variant(self, groups: Sequence[RowGroup]) -> str:
        """The kind of launch that these requests lead to; layers recorded for one kind serve no other."""
        return ""

    def unfit(self, groups: Sequence[RowGroup]) -> str | None:
        """Why these requests' extras have no room in recorded layers."""
        return None

    def room(self, rows: int, requests: int, device: torch.device) -> Room | None:
        """Room for the extras of up to so many rows and requests; None where there never are any."""
        return None

    def forget(self) -> None:
        """Let go of the last call's requests."""
        self._groups = ()


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
