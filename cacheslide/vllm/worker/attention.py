"""Attention of scattered rows over paged KV: the row kernel for the open layout, gathered rows for other layouts."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from cacheslide.core.tensors import send
from cacheslide.kernels import api as kernels
from cacheslide.models.adapter import RowGroup
from cacheslide.models.attention import row_attention

PagedAttention = Callable[[int, Tensor, Sequence[RowGroup], float], Tensor]
# (layer, queries, cache, output tensor) -> attention output
Launch = Callable[[int, Tensor, Tensor, Tensor | None], Tensor]


def gathered(layer: int, q: Tensor, groups: Sequence[RowGroup], scale: float) -> Tensor:
    """Read each request's keys from the cache and attend in plain PyTorch; correct for every layout."""
    out = []
    for part, group in zip(q.split([len(g.rows) for g in groups]), groups, strict=True):
        if len(group.rows):
            every = torch.arange(int(group.rows[-1]) + 1, device=q.device)
            out.append(row_attention(part, *group.kv.read(layer, every), group.rows))
    return torch.cat(out)


class Room(Protocol):
    """Tensors at fixed addresses for an attention's inputs beside rows; padding in them must not change any row."""

    def at(self, rows: int, requests: int) -> "Room":
        """The first part of this memory, for `rows` rows of `requests` requests."""
        ...

    def clear(self) -> None:
        """Fill with padding."""
        ...

    def fill(self, groups: Sequence[RowGroup]) -> None:
        """Copy a run's inputs in; the rest becomes padding."""
        ...


class RowKernel:
    """All requests in one launch over a paged cache in the open layout (key and value of a slot are adjacent).

    An attention with further inputs is a subclass (`cope_rows.py`): `extras` are a run's inputs, `launch` attends with
    them, and `room` holds them for captured layers.
    """

    def __init__(self) -> None:
        self._groups: tuple[RowGroup, ...] = ()

    def __call__(self, layer: int, q: Tensor, groups: Sequence[RowGroup], scale: float) -> Tensor:
        """See `gathered`."""
        launch = self._shared(tuple(groups), q.device, scale)
        return launch(layer, q, groups[0].kv.layers[layer].cache, None)

    def _shared(self, groups: tuple[RowGroup, ...], device: torch.device, scale: float) -> Launch:
        """The launch common to all layers between two selections, made once."""
        unchanged = len(groups) == len(self._groups) and all(a is b for a, b in zip(groups, self._groups, strict=True))
        if not unchanged:
            rows = packed_rows(groups, device)
            self._groups, self._made = groups, self.launch(*rows, scale, self.extras(groups))
        return self._made

    def extras(self, groups: Sequence[RowGroup]) -> Any:
        """Inputs of these requests' attention beside their rows; None without any."""
        return None

    def launch(self, rows: Tensor, cu_rows: Tensor, table: Tensor, scale: float, extras: Any = None) -> Launch:
        """A callable for attention of any layer; rows as in `kernels.row_attention`, and their `extras` or `Room`."""
        attend = kernels.RowAttention(rows, cu_rows, table, scale)
        return lambda layer, q, cache, out: attend(q, cache, out)

    def variant(self, groups: Sequence[RowGroup]) -> str:
        """The kind of launch for these requests; layers captured for one kind serve no other."""
        return ""

    def unfit(self, groups: Sequence[RowGroup]) -> str | None:
        """Why these requests' extras do not fit captured layers; None if they do."""
        return None

    def room(self, rows: int, requests: int, device: torch.device) -> Room | None:
        """Room for the extras of up to that many rows and requests; None if there are never any."""
        return None

    def forget(self) -> None:
        """Release the last call's requests."""
        self._groups = ()


def packed_rows(groups: Sequence[RowGroup], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [n], offsets [requests + 1] and block table [requests, blocks] of packed requests, all int32."""
    rows = torch.cat([g.rows for g in groups]).to(torch.int32)
    return rows, send(offsets(groups), device), table_of(groups)


def offsets(groups: Sequence[RowGroup]) -> Tensor:
    """First row of each request in the packed tensor, and the end: int32 [requests + 1], on the host."""
    return torch.tensor([0, *(len(g.rows) for g in groups)]).cumsum(0, dtype=torch.int32)


def table_of(groups: Sequence[RowGroup]) -> Tensor:
    """The requests' block tables, int32 [requests, blocks]; shorter ones are padded with zeros."""
    return torch.nn.utils.rnn.pad_sequence([g.kv.table for g in groups], batch_first=True)
