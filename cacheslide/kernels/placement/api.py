"""Placement of cached rows in a paged KV cache: Triton on CUDA, plain PyTorch elsewhere.

A cache `kv` is vLLM's view [blocks, kv_heads, block_size, 2 * head_dim]: any strides, but the last dimension is
contiguous and holds the key beside the value. A slot is block * block_size + offset.
"""

from collections.abc import Sequence

from torch import Tensor

from cacheslide.kernels.placement import reference
from cacheslide.positions.rope import Rotary


def place_layers(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    deltas: Tensor | None,
    caches: Sequence[Tensor],
    rotary: Rotary,
    pointers: Tensor | None = None,
) -> None:
    """Rotate a chunk's keys to their rows' positions and scatter keys and values, all layers in one launch.

    Parameters
    ----------
    k, v : Tensor [layers, rows, kv_heads, head_dim]
        Keys rotated at their source positions. On the cache's device or in pinned host memory, from which a GPU reads
        only the rows that are placed.
    slots : Tensor [rows], int64
        Destination of each row; -1 skips it (the row is active and writes its own KV). No slot twice.
    deltas : Tensor [rows], int32, optional
        Target minus source position; None places keys as they are stored.
    caches : sequence of Tensor [blocks, kv_heads, block_size, 2 * head_dim]
        One per layer, all of one shape, layout and dtype.
    rotary : Rotary
        Tables on the cache's device that cover every |delta|; on CUDA a delta beyond them gives NaN keys.
    pointers : Tensor [layers], int64, optional
        `cache_pointers(caches)`, if made before.
    """
    if k.shape != v.shape or len(caches) != len(k) or len(slots) != k.shape[1]:
        raise ValueError(f"k {tuple(k.shape)}, v {tuple(v.shape)}, {len(caches)} caches, {len(slots)} slots disagree")
    if not caches or not len(slots):
        return
    kv = caches[0]
    if (kv.shape[1], kv.shape[3]) != (k.shape[2], 2 * k.shape[3]) or 2 * rotary.cos.shape[1] != k.shape[3]:
        raise ValueError(f"rows {tuple(k.shape)} do not fit a cache {tuple(kv.shape)} or the rotation's tables")
    if not kv.is_cuda:
        return reference.place_layers(k, v, slots, deltas, caches, rotary)
    _on_gpu(k, v)
    from cacheslide.kernels.placement import triton

    triton.place_layers(k, v, slots, deltas, caches, rotary, pointers)


def row_deviation(fresh: Tensor, cached: Tensor, deltas: Tensor | None, rotary: Rotary) -> Tensor:
    """Squared distance of fresh keys from moved cached keys, summed over heads and head_dim: float32 [rows].

    fresh, cached [rows, kv_heads, head_dim] and deltas [rows] as in `place_layers`. The moved key is first rounded to
    the dtype of `cached`, as in the cache.
    """
    if fresh.shape != cached.shape:
        raise ValueError(f"fresh {tuple(fresh.shape)} and cached {tuple(cached.shape)} rows disagree")
    if not fresh.is_cuda:
        return reference.row_deviation(fresh, cached, deltas, rotary)
    _on_gpu(fresh, cached)
    from cacheslide.kernels.placement import triton

    return triton.row_deviation(fresh, cached, deltas, rotary)


def cache_pointers(caches: Sequence[Tensor]) -> Tensor:
    """Addresses of CUDA caches, int64 [layers], for `place_layers`. Made once per model: it copies from the host."""
    from cacheslide.kernels.placement import triton

    return triton.cache_pointers(caches)


def _on_gpu(*tensors: Tensor) -> None:
    for x in tensors:
        if x.stride(-1) != 1:
            raise ValueError("the last dimension of cached and fresh rows must be contiguous")
        if not x.is_cuda and not x.is_pinned():
            raise ValueError("a GPU reads rows from its own or from pinned host memory, not from pageable memory")
