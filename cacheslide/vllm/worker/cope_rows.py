"""CoPE attention of scattered rows over paged KV; position tables and slot offsets come from vLLM's layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cacheslide.core.tensors import send
from cacheslide.kernels.cope.api import CopeAttention
from cacheslide.models.adapter import RowGroup
from cacheslide.positions.ccpe import NOWHERE, SlotOffsets, canonical_rows, pack_slots
from cacheslide.vllm.cope.slots import LayerOffsets
from cacheslide.vllm.worker.attention import Launch, RowKernel

MOST_SLOTS = 32  # maximum slots of a request in captured layers


class LayerSlots(Protocol):
    """The updated slots of packed requests in every layer."""

    slots: SlotOffsets  # of the first layer
    layers: Sequence[Tensor]  # offsets [slots, heads] of each layer


@dataclass(frozen=True)
class RunSlots:
    """`LayerSlots` of one run."""

    slots: SlotOffsets
    layers: Sequence[Tensor]


@dataclass(frozen=True)
class SlotRoom:
    """`LayerSlots` at fixed addresses: a `Room`. Every request has `most` slots; unused ones lie behind all rows.

    Attributes
    ----------
    bounds : Tensor [requests * most, 2], int32
    cu_slots : Tensor [requests + 1], int32
    canonical : Tensor [rows], bool
    layers : list of Tensor [requests * most, heads], float32
        Offsets of slot i of each request are those of calibrated slot i, in every run.
    """

    bounds: Tensor
    cu_slots: Tensor
    canonical: Tensor
    layers: list[Tensor]
    most: int
    cap: bool

    @classmethod
    def make(cls, offsets: LayerOffsets, rows: int, requests: int, device: torch.device) -> "SlotRoom":
        """Tensors for up to `rows` rows of `requests` requests."""
        most = min(offsets.known, MOST_SLOTS)
        return cls(
            torch.full((requests * most, 2), NOWHERE, dtype=torch.int32, device=device),
            torch.arange(requests + 1, dtype=torch.int32, device=device) * most,
            torch.zeros(rows, dtype=torch.bool, device=device),
            [layer[:most].repeat(requests, 1) for layer in offsets.offsets],
            most,
            offsets.cap,
        )

    @property
    def slots(self) -> SlotOffsets:
        """See `LayerSlots`."""
        return SlotOffsets(self.bounds, self.cu_slots, self.layers[0], self.canonical, self.cap)

    def at(self, rows: int, requests: int) -> "SlotRoom":
        """See `Room.at`."""
        count = requests * self.most
        parts = self.bounds[:count], self.cu_slots[: requests + 1], self.canonical[:rows]
        return SlotRoom(*parts, [layer[:count] for layer in self.layers], self.most, self.cap)

    def clear(self) -> None:
        """See `Room.clear`."""
        self.bounds.fill_(NOWHERE)
        self.canonical.zero_()

    def fill(self, groups: Sequence[RowGroup]) -> None:
        """See `Room.fill`; requests of up to `most` slots each."""
        bounds = torch.full((len(self.cu_slots) - 1, self.most, 2), NOWHERE, dtype=torch.int32)
        for of, group in zip(bounds, groups, strict=False):
            if count := _slots_of(group):
                of[:count] = torch.tensor(group.kv.updated.bounds)
        self.bounds.copy_(send(bounds.flatten(0, 1), self.bounds.device))
        canonical = torch.cat([canonical_rows(g.kv.updated, g.rows) for g in groups])
        self.canonical[: len(canonical)].copy_(canonical)
        self.canonical[len(canonical) :].zero_()


class CopeRows(RowKernel):
    """CoPE attention of all requests in one launch.

    Parameters
    ----------
    tables : sequence of Tensor [p_max, head_dim]
        The layers' position tables.
    offsets : LayerOffsets
        Canonical offsets of updated slots, where calibrated.
    """

    def __init__(self, tables: Sequence[Tensor], offsets: LayerOffsets) -> None:
        super().__init__()
        self.tables, self.offsets = tables, offsets

    def extras(self, groups: Sequence[RowGroup]) -> RunSlots | None:
        """The requests' slots; None where all gates are live."""
        if not self.offsets.known or (packed := pack_slots([(g.kv.updated, g.rows) for g in groups])) is None:
            return None
        layers = self.offsets.offsets[:, packed.which].unbind()
        slots = SlotOffsets(packed.bounds, packed.cu_slots, layers[0], packed.canonical, self.offsets.cap)
        return RunSlots(slots, layers)

    def launch(
        self, rows: Tensor, cu_rows: Tensor, table: Tensor, scale: float, extras: LayerSlots | None = None
    ) -> Launch:
        """See `RowKernel.launch`."""
        attend = CopeAttention(rows, cu_rows, table, scale, slots=None if extras is None else extras.slots)
        tables, layers = self.tables, [None] * len(self.tables) if extras is None else extras.layers
        return lambda layer, q, cache, out: attend(q, cache, tables[layer], out, layers[layer])

    def variant(self, groups: Sequence[RowGroup]) -> str:
        """See `RowKernel.variant`; the kernel without slots is faster."""
        return "slots" if self._most(groups) else ""

    def unfit(self, groups: Sequence[RowGroup]) -> str | None:
        """See `RowKernel.unfit`."""
        return "slots" if self._most(groups) > MOST_SLOTS else None

    def room(self, rows: int, requests: int, device: torch.device) -> SlotRoom | None:
        """See `RowKernel.room`."""
        return SlotRoom.make(self.offsets, rows, requests, device) if self.offsets.known else None

    def _most(self, groups: Sequence[RowGroup]) -> int:
        return max(map(_slots_of, groups)) if self.offsets.known else 0


def _slots_of(group: RowGroup) -> int:
    return 0 if group.kv.updated is None else len(group.kv.updated.bounds)
