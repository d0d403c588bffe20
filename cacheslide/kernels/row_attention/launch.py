"""Tiling and launch of row attention."""

import functools
import math
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from cacheslide.kernels.bound import BoundKernel
from cacheslide.kernels.row_attention.triton import _merge, _row_attention


@dataclass(frozen=True)
class Tiling:
    """`lanes` query lanes (rows times packed heads) by `keys` keys, and the launch's warps and stages.

    `pack` puts the query heads of one KV head into one tile. `chunk` > 0 also splits every tile's keys into chunks of
    that many (a multiple of `keys`), merged by a second launch: for calls with too few tiles to fill the device.
    """

    lanes: int = 128
    keys: int = 64
    warps: int = 8
    stages: int = 4
    pack: bool = True
    chunk: int = 0


@dataclass(frozen=True)
class Device:
    """Properties of a GPU that the tiling depends on; defaults are an H200's, shared memory in bytes per block.

    `early_launch`: programmatic dependent launch is available (Hopper and later).
    """

    multiprocessors: int = 132
    shared_bytes: int = 232448
    early_launch: bool = True


@dataclass(frozen=True)
class Work:
    """A call's sizes: `rows` query rows in total, of `requests` requests whose keys end before row `span`."""

    rows: int
    requests: int
    span: int
    heads: int
    kv_heads: int
    dim: int
    block_size: int
    dtype: torch.dtype


SMALL = Tiling(lanes=64, warps=4, stages=3)  # two of these fit on a multiprocessor


def choose_tiling(work: Work, device: Device = Device()) -> Tiling:
    """The tiling for a call, by rules from a sweep on an H200 (docs/log.md)."""
    group = work.heads // work.kv_heads
    if work.dtype == torch.float32:  # full float32 products avoid tensor cores: small tiles, or registers spill
        return Tiling(lanes=max(32, triton.next_power_of_2(group)), keys=32, warps=4, stages=2)
    wide = max(128, triton.next_power_of_2(group))
    dense = 2 * work.rows >= work.span * work.requests
    # For dense rows, tiles of one head waste little on the diagonal, and their loads are simpler.
    base = Tiling(lanes=wide, pack=False, stages=3) if dense else Tiling(lanes=wide)
    if work.dim > 128:
        base = replace(SMALL, keys=32, lanes=max(64, triton.next_power_of_2(group)))
    tiles = triton.cdiv(work.rows, wide // group) * work.kv_heads
    waves = tiles / device.multiprocessors
    if not dense and 0.75 <= waves < 2 and work.dim <= 128 and group <= SMALL.lanes:
        base = _quartered(work)
    elif waves < 1.5:
        base = _spread(work, base, device)
    return fitting(base, work.dim, device)


def _quartered(work: Work) -> Tiling:
    """For a load's rows in few waves, short ones in front and long ones behind: a quarter of the keys at a time.

    The longest tile alone would take longer than the device's share of all of them. From two waves on the merge costs
    more than this saves.
    """
    chunk = max(1024, triton.next_power_of_2(triton.cdiv(work.span, 4)))
    return replace(SMALL, chunk=chunk) if chunk < work.span else SMALL


def _spread(work: Work, base: Tiling, device: Device) -> Tiling:
    """For calls with few tiles: smaller tiles, and the smallest chunks of keys that fit in about one wave."""
    group = work.heads // work.kv_heads
    for cut, slots in ((base, device.multiprocessors), (SMALL, 2 * device.multiprocessors)):
        if cut.lanes < group:
            continue
        tiles = triton.cdiv(work.rows, cut.lanes // group) * work.kv_heads
        if cut is base and tiles < 0.75 * slots:
            continue
        for chunk in (1024, 2048, 4096, 8192, 16384, 32768):
            if chunk < work.span and tiles * (work.span / chunk + 1) / 2 <= 1.2 * slots:
                return replace(cut, chunk=chunk, pack=True, stages=3)
    return SMALL if group <= SMALL.lanes and work.dim <= 128 else base


def fitting(tiling: Tiling, dim: int, device: Device) -> Tiling:
    """The same tiling with stages and keys reduced to what the device's shared memory holds."""
    while tiling.stages > 2 and _shared_bytes(tiling, dim) > device.shared_bytes:
        tiling = replace(tiling, stages=tiling.stages - 1)
    return replace(tiling, keys=32) if _shared_bytes(tiling, dim) > device.shared_bytes else tiling


def _shared_bytes(tiling: Tiling, dim: int) -> int:
    """Bytes of shared memory for 16-bit queries and every stage's keys and values."""
    return 2 * triton.next_power_of_2(dim) * (tiling.lanes + 2 * tiling.stages * tiling.keys)


class RowLaunch:
    """The launch of row attention for one set of rows: grid and arguments, for the tensors of any layer.

    Parameters
    ----------
    q, kv, out : Tensor
        Tensors of the first call; those of later calls may differ only in their memory.
    rows, cu_rows, block_table, scale, max_row
        See `cacheslide.kernels.row_attention.api.row_attention`.
    tiling : Tiling, optional
        Overrides the choice of tiles.
    """

    def __init__(
        self,
        q: Tensor,
        rows: Tensor,
        cu_rows: Tensor,
        block_table: Tensor,
        kv: Tensor,
        scale: float | None = None,
        out: Tensor | None = None,
        max_row: int | None = None,
        tiling: Tiling | None = None,
    ) -> None:
        self.shape = n, heads, dim = q.shape
        kv_heads, block_size = kv.shape[1:3]
        requests = block_table.shape[0]
        span = block_table.shape[1] * block_size if max_row is None else max_row + 1
        if tiling is None:
            work = Work(n, requests, span, heads, kv_heads, dim, block_size, q.dtype)
            tiling = choose_tiling(work, device_of(q))
        pack = heads // kv_heads if tiling.pack else 1
        padded = max(16, triton.next_power_of_2(dim))
        self.chunks = triton.cdiv(span, tiling.chunk) if tiling.chunk else 0
        self.split = tiling.chunk > 0
        self.rows, self.shared = rows, (rows, cu_rows, block_table)
        out_row, out_head = (torch.empty_like(q) if out is None else out).stride()[:2]
        # of the chunks' outputs and sums, float32 and contiguous
        steps = (n * heads * dim, heads * dim, dim, n * heads, heads) if self.split else (0, out_row, out_head, 0, 0)
        scale = (dim**-0.5 if scale is None else scale) * math.log2(math.e)
        self.numbers = requests, scale, tiling.chunk, *q.stride()[:2], *steps, block_table.stride(0), *kv.stride()[:3]
        sizes = {"BLOCK_SIZE": block_size, "GROUP": heads // kv_heads, "PACK": pack, "HEAD_DIM": dim}
        sizes |= {"BLOCK_M": tiling.lanes, "BLOCK_N": tiling.keys, "SPLIT": self.split, "STAGES": tiling.stages}
        sizes |= {"PAD_DIM": padded, "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32"}
        grid = heads // pack, n // (tiling.lanes // pack) + requests, max(1, self.chunks)
        self.attend = BoundKernel(_row_attention, grid, sizes, num_warps=tiling.warps, num_stages=tiling.stages)
        if self.split:
            block = max(1, 2048 // padded)
            self.merge_numbers = n, heads, tiling.chunk, n * heads * dim, out_row, out_head
            sizes = {"HEAD_DIM": dim, "PAD_DIM": padded, "BLOCK": block, "EARLY": False}
            self.merge = BoundKernel(_merge, (triton.cdiv(n * heads, block), 1, 1), sizes)

    def __call__(self, q: Tensor, kv: Tensor, out: Tensor | None = None) -> Tensor:
        """Attention of `q` [n, heads, head_dim] over the cache `kv`, into `out`."""
        out = torch.empty_like(q) if out is None else out
        n, heads, dim = self.shape
        if not n:
            return out
        target = lse = out
        if self.split:
            target = torch.empty(self.chunks, n, heads, dim, dtype=torch.float32, device=q.device)
            lse = torch.empty(self.chunks, n, heads, dtype=torch.float32, device=q.device)
        self.attend((q, *self.shared, kv, target, lse), self.numbers)
        if self.split:
            self.merge((target, lse, self.rows, out), self.merge_numbers)
        return out


def row_attention(
    q: Tensor,
    rows: Tensor,
    cu_rows: Tensor,
    block_table: Tensor,
    kv: Tensor,
    scale: float | None = None,
    out: Tensor | None = None,
    max_row: int | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """See `cacheslide.kernels.row_attention.api.row_attention`; `tiling` overrides the choice of tiles."""
    return RowLaunch(q, rows, cu_rows, block_table, kv, scale, out, max_row, tiling)(q, kv, out)


def device_of(x: Tensor) -> Device:
    """The properties of a tensor's device; under Triton's interpreter, one multiprocessor."""
    return _device(x.device.index or 0) if x.is_cuda else Device(1, early_launch=False)


@functools.cache
def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.multi_processor_count, properties.shared_memory_per_block_optin, properties.major >= 9)
