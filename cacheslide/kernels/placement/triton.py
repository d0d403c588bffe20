"""Triton kernels that delta-rotate cached rows: one scatters them into the paged cache, one compares with fresh keys.

Both read a cached row once and keep the rotated key in registers. A lane is one head of one row.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cacheslide.kernels.bound import BoundKernel
from cacheslide.positions.rope import Rotary

_PAIRS = 1024  # rotation pairs of a program: one 16-byte load a thread per half of a key in bf16
_ANYWHERE = (2, 3, 4)  # `slots`, `deltas`, `caches` of `_place`: a chunk's part of a request may start at any alignment
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _turn(k, at, delta, cos, sin, positions, valid, HALF: tl.constexpr, d):
    """Both halves of the keys at `at` [lanes], rotated by `delta` [lanes] positions: float32 [lanes, PAD_HALF] each."""
    a = tl.load(k + at[:, None] + d[None, :], mask=valid, other=0.0).to(tl.float32)
    b = tl.load(k + at[:, None] + HALF + d[None, :], mask=valid, other=0.0).to(tl.float32)
    by = tl.abs(delta)
    angle = by.to(tl.int64)[:, None] * HALF + d[None, :]
    known = valid & (by < positions)[:, None]  # a turn beyond the tables gives NaN, never a wrong key
    c = tl.load(cos + angle, mask=known, other=float("nan"))
    s = tl.load(sin + angle, mask=known, other=float("nan")) * tl.where(delta < 0, -1.0, 1.0)[:, None]
    return a * c - b * s, b * c + a * s


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["slots", "deltas", "caches"])
def _place(
    k, v, slots, deltas, caches, cos, sin, rows, heads, positions,
    k_layer, k_row, k_head, v_layer, v_row, v_head, kv_block, kv_head, kv_slot,
    BLOCK_SIZE: tl.constexpr, HALF: tl.constexpr, PAD_HALF: tl.constexpr, LANES: tl.constexpr,
    ROTATE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(1)
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    row = lane // heads
    head = (lane % heads).to(tl.int64)
    slot = tl.load(slots + row, mask=row < rows, other=-1)
    d = tl.arange(0, PAD_HALF)
    valid = (slot >= 0)[:, None] & (d < HALF)[None, :]
    row64 = row.to(tl.int64)
    from_k = layer.to(tl.int64) * k_layer + row64 * k_row + head * k_head
    from_v = layer.to(tl.int64) * v_layer + row64 * v_row + head * v_head
    v_low = tl.load(v + from_v[:, None] + d[None, :], mask=valid)
    v_high = tl.load(v + from_v[:, None] + HALF + d[None, :], mask=valid)
    if ROTATE:
        delta = tl.load(deltas + row, mask=row < rows, other=0)
        k_low, k_high = _turn(k, from_k, delta, cos, sin, positions, valid, HALF, d)
    else:
        k_low = tl.load(k + from_k[:, None] + d[None, :], mask=valid)
        k_high = tl.load(k + from_k[:, None] + HALF + d[None, :], mask=valid)
    cache = tl.multiple_of(tl.load(caches + layer).to(tl.pointer_type(DTYPE)), 16)
    to = (slot // BLOCK_SIZE) * kv_block + head * kv_head + (slot % BLOCK_SIZE) * kv_slot
    at = cache + to[:, None] + d[None, :]
    tl.store(at, k_low.to(DTYPE), mask=valid)
    tl.store(at + HALF, k_high.to(DTYPE), mask=valid)
    tl.store(at + 2 * HALF, v_low.to(DTYPE), mask=valid)
    tl.store(at + 3 * HALF, v_high.to(DTYPE), mask=valid)


@triton.jit(do_not_specialize_on_alignment=["deltas", "out"])  # chunk parts start at any alignment
def _deviation(
    fresh, cached, deltas, cos, sin, out, heads, positions, fresh_row, fresh_head, cached_row, cached_head,
    HALF: tl.constexpr, PAD_HALF: tl.constexpr, PAD_HEADS: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.arange(0, PAD_HEADS)
    d = tl.arange(0, PAD_HALF)
    valid = (head < heads)[:, None] & (d < HALF)[None, :]
    at = row.to(tl.int64) * cached_row + head * cached_head
    if ROTATE:
        delta = tl.load(deltas + row) + tl.zeros([PAD_HEADS], tl.int32)
        low, high = _turn(cached, at, delta, cos, sin, positions, valid, HALF, d)
        # Rounded like a placed key, so that the deviation equals that of the key in the cache.
        low = low.to(cached.dtype.element_ty).to(tl.float32)
        high = high.to(cached.dtype.element_ty).to(tl.float32)
    else:
        low = tl.load(cached + at[:, None] + d[None, :], mask=valid, other=0.0).to(tl.float32)
        high = tl.load(cached + at[:, None] + HALF + d[None, :], mask=valid, other=0.0).to(tl.float32)
    at = row.to(tl.int64) * fresh_row + head * fresh_head
    low -= tl.load(fresh + at[:, None] + d[None, :], mask=valid, other=0.0).to(tl.float32)
    high -= tl.load(fresh + at[:, None] + HALF + d[None, :], mask=valid, other=0.0).to(tl.float32)
    squares = tl.where(valid, low * low + high * high, 0.0)
    tl.store(out + row, tl.sum(tl.sum(squares, 1), 0))


def cache_pointers(caches: Sequence[Tensor]) -> Tensor:
    """Addresses of the layers' caches, int64 [layers] on their device. Make them once: it copies from the host."""
    first = caches[0]
    for kv in caches:
        if kv.shape[1:] != first.shape[1:] or kv.stride() != first.stride() or kv.dtype != first.dtype:
            raise ValueError("the caches of one launch must share shape, strides and dtype")
        if kv.data_ptr() % 16:
            raise ValueError("a cache must start at a multiple of 16 bytes")
    return torch.tensor([kv.data_ptr() for kv in caches], dtype=torch.int64).to(first.device)


def place_layers(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    deltas: Tensor | None,
    caches: Sequence[Tensor],
    rotary: Rotary,
    pointers: Tensor | None = None,
) -> None:
    """See `cacheslide.kernels.placement.api.place_layers`."""
    layers, rows, heads, dim = k.shape
    if not rows or not layers:
        return  # a grid of size 0 is an error
    kv = caches[0]
    half = dim // 2
    padded = triton.next_power_of_2(half)
    lanes = max(1, _PAIRS // padded)
    pointers = cache_pointers(caches) if pointers is None else pointers
    numbers = rows, heads, rotary.max_positions, *k.stride()[:3], *v.stride()[:3], *kv.stride()[:3]
    grid = triton.cdiv(rows * heads, lanes), layers, 1
    launch = _bound(grid, numbers, (half, padded, lanes, kv.shape[2]), deltas is not None, k.dtype, kv.dtype, kv.device)
    launch((k, v, slots, slots if deltas is None else deltas, pointers, rotary.cos, rotary.sin), numbers)


@functools.lru_cache(maxsize=256)
def _bound(
    grid: tuple[int, int, int],
    numbers: tuple[int, ...],
    sizes: tuple[int, int, int, int],
    rotate: bool,
    source: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
) -> BoundKernel:
    """The launch for chunks of one shape; a request has many of them, which may come in groups of layers.

    All arguments are part of the cache key; `numbers`, `source` and `device` are used for nothing else.
    """
    half, padded, lanes, block = sizes
    constants = {"BLOCK_SIZE": block, "HALF": half, "PAD_HALF": padded, "LANES": lanes, "ROTATE": rotate}
    return BoundKernel(_place, grid, constants | {"DTYPE": _DTYPES[dtype]}, anywhere=_ANYWHERE)


def row_deviation(fresh: Tensor, cached: Tensor, deltas: Tensor | None, rotary: Rotary) -> Tensor:
    """See `cacheslide.kernels.placement.api.row_deviation`."""
    rows, heads, dim = cached.shape
    out = torch.empty(rows, dtype=torch.float32, device=fresh.device)
    if rows:
        half = dim // 2
        _deviation[(rows,)](
            fresh, cached, out if deltas is None else deltas, rotary.cos, rotary.sin, out, heads, rotary.max_positions,
            *fresh.stride()[:2], *cached.stride()[:2], HALF=half, PAD_HALF=triton.next_power_of_2(half),
            PAD_HEADS=triton.next_power_of_2(heads), ROTATE=deltas is not None,
        )  # fmt: skip
    return out
