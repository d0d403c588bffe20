"""CCPE, chunked contextual position encoding (paper section 4.2, Alg. 1): canonical offsets of updated slots.

Under CoPE the distance between a query and the keys of a fixed chunk is the sum of the gates between them. An updated
segment between them changes that sum every turn. CCPE makes it constant: seen from the fixed chunks behind it, an
updated slot always takes Γ positions (one number per layer, head and slot), whatever text fills it. Inside chunks, and
for queries that are recomputed every turn, live gates are summed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cacheslide.core.prompt import Prompt, Role
from cacheslide.core.tensors import send, tensor_of
from cacheslide.errors import PromptError

NOWHERE = 2**31 - 1  # first and end row of a slot behind all rows


@dataclass(frozen=True)
class SlotOffsets:
    """The updated slots of a call's requests, and their offsets.

    Attributes
    ----------
    bounds : Tensor [slots, 2], int32
        First row and end row of every slot; ascending and disjoint inside a request. Empty slots are crossed too: a
        chunk is encoded behind the fixed chunks alone in that way.
    cu_slots : Tensor [requests + 1], int32
        Request i owns slots cu_slots[i]..cu_slots[i + 1].
    offsets : Tensor [slots, heads], float32
        Γ of every slot for every query head, in positions, at least 0.
    canonical : Tensor [n], bool
        Which query rows cross slots by Γ (those of fixed chunks); a slot counts for rows at or behind its end.
    cap : bool
        Whether the slot's own keys lie at most Γ positions deep in it, so that positions never decrease towards the
        left at the slot's edge.
    """

    bounds: Tensor
    cu_slots: Tensor
    offsets: Tensor
    canonical: Tensor
    cap: bool = False

    def __post_init__(self) -> None:
        if self.bounds.dim() != 2 or self.bounds.shape[1] != 2 or self.offsets.shape[0] != len(self.bounds):
            raise PromptError(f"slots {tuple(self.bounds.shape)} and offsets {tuple(self.offsets.shape)} disagree")

    def of(self, request: int, rows: slice) -> "SlotOffsets":
        """The slots of one request, for the query rows `rows` of the packed call."""
        begin, end = self.cu_slots[request : request + 2].tolist()
        cu = torch.tensor([0, end - begin], dtype=torch.int32)
        return SlotOffsets(self.bounds[begin:end], cu, self.offsets[begin:end], self.canonical[rows], self.cap)


@dataclass(frozen=True)
class PackedSlots:
    """Slots of a call without a layer's offsets; `which`, int64 [slots], is each slot's index in the calibration."""

    bounds: Tensor
    cu_slots: Tensor
    which: Tensor
    canonical: Tensor

    def with_offsets(self, layer: Tensor, cap: bool) -> SlotOffsets:
        """`SlotOffsets` with one layer's Γ [calibrated slots, heads]."""
        return SlotOffsets(self.bounds, self.cu_slots, layer[self.which], self.canonical, cap)


def pack_slots(parts: "Sequence[tuple[PromptSlots | None, Tensor]]") -> PackedSlots | None:
    """The packed slots of several requests, from each one's slots (None: all gates live) and query rows [n].

    None if no request has a slot. Rows behind a prompt are generated; they cross by live gates.
    """
    if not any(slots is not None and slots.bounds for slots, _ in parts):
        return None
    bounds, which, sizes, canonical = [], [], [0], []
    for slots, rows in parts:
        own_bounds = () if slots is None else slots.bounds
        bounds += own_bounds
        which += range(len(own_bounds))
        sizes.append(len(which))
        canonical.append(canonical_rows(slots, rows))
    device = parts[0][1].device
    numbers = send(torch.tensor([*sum(bounds, ()), *sizes], dtype=torch.int32), device)
    pairs, cu_slots = numbers.split([2 * len(bounds), len(sizes)])
    cu_slots = cu_slots.clone()  # realigned: the kernel is compiled anew for another alignment
    return PackedSlots(pairs.view(-1, 2), cu_slots, send(tensor_of(which), device), torch.cat(canonical))


def canonical_rows(slots: "PromptSlots | None", rows: Tensor) -> Tensor:
    """Which of a request's query rows [n] cross its slots by Γ, bool [n]; rows behind its prompt are generated."""
    if slots is None or not slots.bounds:
        return torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    fixed = slots.canonical.to(rows.device)
    return fixed[rows.clamp(max=len(fixed) - 1)] & (rows < len(fixed))


def check_slots(slots: "PromptSlots", known: int) -> None:
    """Raise PromptError for more than `known` slots, the number that Γ was calibrated for."""
    if len(slots.bounds) > known:
        raise PromptError(f"the prompt has {len(slots.bounds)} updated slots, but Γ was calibrated for {known}")


def positions_with_offsets(gates: Tensor, rows: Tensor, slots: SlotOffsets) -> Tensor:
    """Contextual positions of keys with canonical offsets, not yet clamped.

    Parameters
    ----------
    gates : Tensor [heads, n, keys]
        0 where the key lies behind the query.
    rows : Tensor [n]
        Rows of the queries.
    slots : SlotOffsets
        Slots of one request.

    Returns
    -------
    Tensor [heads, n, keys]
        For a query that crosses slots by Γ: for keys outside slots, the live gates outside slots plus Γ of every slot
        passed; inside a slot, the live gates of its keys plus the position at its end.
    """
    live = suffix_sum(gates)
    kept = slots.bounds[:, 1] < gates.shape[2]  # no query lies behind the end of other slots
    pairs = slots.bounds[kept].tolist()
    passes = [(slots.canonical & (rows >= end))[None, :, None] for _, end in pairs]
    outer = gates.clone()
    for (first, end), passed in zip(pairs, passes, strict=True):
        outer[:, :, first:end] = outer[:, :, first:end].masked_fill(passed, 0)
    outer = suffix_sum(outer)
    result, jumps = outer.clone(), torch.zeros_like(outer[:, :, :1])
    # From right to left: `jumps` sums the offsets of the slots already crossed.
    for (first, end), passed, offset in reversed(list(zip(pairs, passes, slots.offsets[kept], strict=True))):
        offset = offset.to(gates.dtype)[:, None, None]
        deep = live[:, :, first:end] - live[:, :, end : end + 1]
        deep = torch.minimum(deep, offset) if slots.cap else deep
        entered = outer[:, :, end : end + 1] + jumps + deep
        result[:, :, first:end] = torch.where(passed, entered, result[:, :, first:end])
        jumps = jumps + passed * offset
        result[:, :, :first] += passed * offset
    return result


def suffix_sum(gates: Tensor) -> Tensor:
    """Sums from the right along the last dimension: out[j] = gates[j] + gates[j + 1] + ..."""
    return gates.flip(-1).cumsum(-1).flip(-1)


@dataclass(frozen=True)
class PromptSlots:
    """The updated slots of one token sequence, and its rows that belong to fixed chunks.

    `bounds` holds (first row, end row) of every slot before the last fixed segment, in the template's order: slot i
    is calibrated slot i. In a chain of fixed segments alone slots are empty. `canonical` is bool [rows].
    """

    bounds: tuple[tuple[int, int], ...]
    canonical: Tensor


def slots_in(prompt: Prompt) -> PromptSlots:
    """The slots of a prompt. Adjacent updated segments are one slot."""
    return _slots(prompt, with_updated=True)


def slots_between(prompt: Prompt) -> PromptSlots:
    """The same slots, empty, in the chain of the prompt's fixed segments (the text of the canonical encoding)."""
    return _slots(prompt, with_updated=False)


def _slots(prompt: Prompt, with_updated: bool) -> PromptSlots:
    bounds: list[tuple[int, int]] = []
    runs: list[Tensor] = []
    pending, at = None, 0  # first row of the open slot, and the current row
    for segment in prompt.segments:
        fixed = segment.role is Role.REUSE
        if fixed and pending is not None:
            bounds.append((pending, at))
            pending = None
        elif not fixed and pending is None:
            pending = at
        runs.append(torch.full((len(segment.token_ids) if fixed or with_updated else 0,), fixed))
        at += len(runs[-1])
    return PromptSlots(tuple(bounds), torch.cat(runs))
