"""CCPE in vLLM's own forward: rows of a batch that cross updated slots by their calibrated offset.

The connector knows the slots of annotated requests by id; the attention backend has a batch without ids. They are
matched by block: the block of a request's first row in a step is written by that request alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cacheslide.core.tensors import send
from cacheslide.positions.ccpe import NOWHERE, PromptSlots, SlotOffsets


@dataclass(frozen=True)
class SlotRows:
    """An annotated request of the next step: vLLM computes its rows [first, end); `block_ids` are the scheduler's."""

    block_ids: tuple[int, ...]
    first: int
    end: int
    slots: PromptSlots


class LayerOffsets:
    """Γ of this rank's heads, shared by a model's layers, and the slots of the next step's requests.

    Parameters
    ----------
    offsets : Tensor [layers, slots, heads], float32, optional
        On the model's device; None if all gates are live.
    cap : bool
        See `SlotOffsets`.
    """

    def __init__(self, offsets: Tensor | None = None, cap: bool = False) -> None:
        self.offsets, self.cap = offsets, cap
        self.known = 0 if offsets is None else offsets.shape[1]
        self.fault: Exception | None = None  # why rows of this step crossed slots by live gates
        self._step: Sequence[SlotRows] = ()
        self._manager_block = 1

    def expect(self, step: Sequence[SlotRows], manager_block: int) -> None:
        """Set the next step's requests with slots; called with none when the step is over."""
        self._step, self._manager_block = step, manager_block

    def of_batch(self, rows: Tensor, bounds: Tensor, table: Tensor, block_size: int) -> list[SlotOffsets] | None:
        """Slots of a batch for every layer, None where all gates are live. Does not wait for the device.

        On an error the batch uses live gates and the exception is kept in `fault`, since the forward must not raise.

        Parameters
        ----------
        rows : Tensor [n], int32
            Rows of the tokens.
        bounds : Tensor [requests + 1], int32
            Request i owns tokens bounds[i]..bounds[i + 1], at least one.
        table : Tensor [requests, blocks], int32
            Block ids, in blocks of `block_size` rows.
        """
        if not self._step:
            return None
        try:
            return self._of_batch(rows, bounds, table, block_size)
        except Exception as error:
            self.fault = error
            return None

    def _of_batch(self, rows: Tensor, bounds: Tensor, table: Tensor, block_size: int) -> list[SlotOffsets]:
        device, requests = rows.device, len(bounds) - 1
        most = max(len(s.slots.bounds) for s in self._step)
        entries, lengths, flags = [], [], []
        for s in self._step:
            pieces = self._manager_block // block_size
            block = s.block_ids[s.first // self._manager_block] * pieces + s.first % self._manager_block // block_size
            pairs = [x for pair in s.slots.bounds for x in pair]
            entries.append([block, *pairs, *[NOWHERE] * (2 * most - len(pairs))])
            lengths.append(s.end - s.first)
            own = s.slots.canonical[s.first : s.end]
            flags.append(torch.nn.functional.pad(own, (0, lengths[-1] - len(own))))  # then generated rows
        known = send(torch.tensor(entries, dtype=torch.int32), device)
        sizes, flags = send(torch.tensor(lengths), device), send(torch.cat(flags), device)

        starts = bounds[:-1].long()
        # The block that each request writes first.
        blocks = table.gather(1, (rows[starts].long() // block_size)[:, None])[:, 0]
        equal = known[:, :1] == blocks
        matched, where = equal.any(1), equal.int().argmax(1)
        pairs = torch.full((requests + 1, 2 * most), NOWHERE, dtype=torch.int32, device=device)
        pairs.index_copy_(0, torch.where(matched, where, requests), known[:, 1:])  # index `requests`: no match
        total, every = len(flags), torch.repeat_interleave
        inside = torch.arange(total, device=device) - every(sizes.cumsum(0) - sizes, sizes, output_size=total)
        canonical = torch.zeros(len(rows) + total, dtype=torch.bool, device=device)
        at = every(torch.where(matched, starts[where], len(rows)), sizes, output_size=total) + inside
        canonical.index_copy_(0, at, flags)
        cu_slots = torch.arange(requests + 1, dtype=torch.int32, device=device) * most
        offsets = self.offsets[:, :most].repeat(1, requests, 1)
        edges, canonical = pairs[:requests].reshape(-1, 2), canonical[: len(rows)]
        return [SlotOffsets(edges, cu_slots, layer, canonical, self.cap) for layer in offsets]
