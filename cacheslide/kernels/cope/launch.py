"""Tiling and launch of CoPE attention."""

import math
import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cacheslide.kernels.bound import BoundKernel
from cacheslide.kernels.cope.forward import _cope_attention
from cacheslide.kernels.row_attention.launch import Work
from cacheslide.positions.ccpe import SlotOffsets

_GATE = {torch.float32: tl.float32, torch.bfloat16: tl.float16, torch.float16: tl.float16}
_ASM = os.environ.get("TRITON_INTERPRET") != "1"  # the interpreter does not run assembly
_ANYWHERE = (12,)  # slot offsets: a slice of all layers' offsets, at any alignment
_LONG_RUN = 32  # whole tiles between two checks whether all rows have saturated


@dataclass(frozen=True)
class CopeTiling:
    """`lanes` query lanes (rows times packed heads) by `keys` keys, the launch's warps and stages.

    Once all rows have saturated, keys are taken `far_keys` (a multiple of `keys`) at a time, in `far_stages` stages,
    and with `steady` under a fixed maximum (not in float16, where weights would overflow). Wider tiles of 128 lanes and
    8 warps were slower at every length and kind of gates on an H200 (docs/log.md); with head_dim 16 Triton 3.6 also
    compiles them wrongly.
    """

    lanes: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 2
    pack: bool = True
    far_keys: int = 64
    far_stages: int = 3
    steady: bool = True


@dataclass(frozen=True)
class Blocks:
    """Keys and values [blocks, kv_heads, block_size, head_dim] of equal strides, and each request's block ids."""

    k: Tensor
    v: Tensor
    table: Tensor

    @property
    def block_size(self) -> int:
        """Slots per block."""
        return self.k.shape[2]

    @property
    def strides(self) -> tuple[int, int, int]:
        """Strides of a block, a head and a slot, in elements."""
        return self.k.stride()[:3]


def paged(kv: Tensor, table: Tensor) -> Blocks:
    """Views of the keys and the values of a paged cache [blocks, kv_heads, block_size, 2 * head_dim]."""
    dim = kv.shape[3] // 2
    return Blocks(kv[..., :dim], kv[..., dim:], table)


def choose_tiling(work: Work) -> CopeTiling:
    """The tiling for a call; dense rows are not packed."""
    group = work.heads // work.kv_heads
    least = triton.next_power_of_2(group)
    if work.dtype == torch.float32:  # full float32 products avoid tensor cores: small tiles, or registers spill
        return CopeTiling(lanes=max(32, least), keys=32, far_keys=32, far_stages=2)
    dense = 2 * work.rows >= work.span * work.requests
    if work.dim > 128:
        return CopeTiling(lanes=max(64, least), keys=32, pack=not dense, far_keys=32, far_stages=2)
    return CopeTiling(lanes=max(64, least), warps=4 if least <= 64 else 8, pack=not dense)


class CopeLaunch:
    """The launch of CoPE attention for one set of rows: grid and arguments, for the tensors of any layer.

    Parameters
    ----------
    q, blocks, embedding, out, lse
        Tensors of the first call; those of later calls may differ only in their memory.
    rows, cu_rows, scale, max_row, slots
        See `cacheslide.kernels.cope.api.cope_attention`.
    tiling : CopeTiling, optional
        Overrides the choice of tiles.
    """

    def __init__(
        self,
        q: Tensor,
        rows: Tensor,
        cu_rows: Tensor,
        blocks: Blocks,
        embedding: Tensor,
        scale: float | None = None,
        out: Tensor | None = None,
        max_row: int | None = None,
        slots: SlotOffsets | None = None,
        lse: Tensor | None = None,
        tiling: CopeTiling | None = None,
    ) -> None:
        n, heads, dim = q.shape
        kv_heads, block_size = blocks.k.shape[1], blocks.block_size
        requests, table = blocks.table.shape[0], blocks.table
        self.shared = rows, cu_rows, table
        self.slots = None if slots is None or not len(slots.bounds) else slots
        span = table.shape[1] * block_size if max_row is None else max_row + 1
        work = Work(n, requests, span, heads, kv_heads, dim, block_size, q.dtype)
        tiling = tiling or choose_tiling(work)
        pack = heads // kv_heads if tiling.pack else 1
        grid = heads // pack, n // (tiling.lanes // pack) + requests, 1
        p_max = embedding.shape[0]
        padded_p = max(16, triton.next_power_of_2(p_max))
        self.scratch = grid[0] * grid[1], padded_p + 2, tiling.lanes
        out_row, out_head = (torch.empty_like(q) if out is None else out).stride()[:2]
        scale = (dim**-0.5 if scale is None else scale) * math.log2(math.e)
        strides = *q.stride()[:2], out_row, out_head, 0 if lse is None else lse.stride(0)
        self.numbers = requests, heads, scale, *strides, table.stride(0), *blocks.strides, embedding.stride(0)
        exact, slotted = q.dtype == torch.float32, self.slots is not None
        sizes = {"BLOCK_SIZE": block_size, "GROUP": heads // kv_heads, "PACK": pack, "HEAD_DIM": dim}
        sizes |= {"PAD_DIM": max(16, triton.next_power_of_2(dim)), "P_MAX": p_max, "PAD_P": padded_p}
        sizes |= {"BLOCK_M": tiling.lanes, "BLOCK_N": tiling.keys, "RUN": _LONG_RUN}
        sizes |= {"FAR_N": max(tiling.far_keys, tiling.keys), "FAR_STAGES": tiling.far_stages}
        sizes |= {"SLOTS": slotted, "CAPPED": slotted and self.slots.cap, "LSE": lse is not None}
        sizes |= {"GATE": _GATE[q.dtype], "PRECISION": "ieee" if exact else "tf32", "STAGES": tiling.stages}
        sizes |= {"ASM": _ASM, "STEADY": tiling.steady and q.dtype != torch.float16}
        options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
        self.attend = BoundKernel(_cope_attention, grid, sizes, anywhere=_ANYWHERE, **options)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        embedding: Tensor,
        out: Tensor | None = None,
        offsets: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> Tensor:
        """Attention of `q` [n, heads, head_dim]; `offsets` [slots, heads] replace those of `slots`."""
        out = torch.empty_like(q) if out is None else out
        if not len(q):
            return out
        slot_args = (out,) * 4
        if (slots := self.slots) is not None:
            slot_args = slots.bounds, slots.cu_slots, slots.offsets if offsets is None else offsets, slots.canonical
        entries = torch.empty(self.scratch, dtype=torch.float32, device=q.device)
        sums = out if lse is None else lse
        self.attend((q, *self.shared, k, v, embedding, entries, out, sums, *slot_args), self.numbers)
        return out


def cope_attention(
    q: Tensor,
    rows: Tensor,
    cu_rows: Tensor,
    blocks: Blocks,
    embedding: Tensor,
    scale: float | None = None,
    out: Tensor | None = None,
    max_row: int | None = None,
    slots: SlotOffsets | None = None,
    lse: Tensor | None = None,
    tiling: CopeTiling | None = None,
) -> Tensor:
    """See `kernels.cope.api.cope_attention`; `lse` [n, heads] float32 receives log2 of the softmax sums."""
    launch = CopeLaunch(q, rows, cu_rows, blocks, embedding, scale, out, max_row, slots, lse, tiling)
    return launch(q, blocks.k, blocks.v, embedding, out, lse=lse)
