"""Reads and writes rows of vLLM's paged KV cache in any layout.

A layer's cache is a view [blocks, kv_heads, block_size, 2 * head_dim]; a slot is block * block_size + offset. GPU
backends keep key and value of a slot adjacent, at any strides. The CPU backend packs every (block, head) region in an
order that depends on the processor; the order is found by writing marked rows into a scratch block.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from cacheslide.core.tensors import send, tensor_of
from cacheslide.models.adapter import RowGroup
from cacheslide.positions.ccpe import PromptSlots

_DIGIT = 7  # bits of an index written at once: numbers up to 127 are exact in every cache dtype


class PagedLayer:
    """One layer's paged cache.

    Parameters
    ----------
    attention : vllm Attention
        Holds the cache, and an implementation that writes into it.
    """

    def __init__(self, attention) -> None:
        self.attention = attention
        self.packed = attention.attn_backend.get_name() == "CPU_ATTN"

    @property
    def cache(self) -> Tensor:
        """The view itself; read each time, since vLLM may reallocate it."""
        return self.attention.kv_cache

    @property
    def block_size(self) -> int:
        """Slots per block, as seen by the attention kernel."""
        return self.cache.shape[2]

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v [n, kv_heads, head_dim] at `slots` [n]."""
        self._update(self.cache, slots, k, v)

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [n, kv_heads, head_dim] at `slots` [n]."""
        size = self.block_size
        if not self.packed:
            return self.cache[slots // size, :, slots % size].chunk(2, dim=-1)
        blocks, where = torch.unique(slots // size, return_inverse=True)
        flat = self.cache[blocks].flatten(2)  # [blocks, kv_heads, block_size * 2 * head_dim]
        both = (flat[:, :, order].unflatten(2, (size, -1)) for order in self._orders)
        k, v = (x[where, :, slots % size] for x in both)
        return k, v

    def _update(self, cache: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
        if len(slots):  # an empty launch is an error on CUDA
            k, v = k.to(cache.dtype), v.to(cache.dtype)
            if self.packed:  # the open layout's kernel accepts rows at any stride
                k, v = k.contiguous(), v.contiguous()
            self.attention.impl.do_kv_cache_update(self.attention, k, v, cache, slots)

    @cached_property
    def _orders(self) -> tuple[Tensor, Tensor]:
        """Index of element (slot, d) of keys, and of values, in a packed region: int64 [block_size * head_dim]."""
        _, heads, size, width = self.cache.shape
        dim = width // 2
        index = torch.arange(size * dim).view(size, 1, dim).expand(size, heads, dim) + 1  # 0 means not written
        orders = []
        for which in range(2):
            indices = torch.zeros(size * width, dtype=torch.int64)
            for shift in range(0, (size * dim).bit_length(), _DIGIT):
                digit = ((index >> shift) & ((1 << _DIGIT) - 1)).to(self.cache.dtype)
                pair = [torch.zeros_like(digit), torch.zeros_like(digit)]
                pair[which] = digit
                scratch = torch.zeros_like(self.cache[:1], memory_format=torch.contiguous_format)
                self._update(scratch, torch.arange(size), *pair)
                regions = scratch.view(heads, -1).long()
                if not torch.equal(regions, regions[:1].expand_as(regions)):
                    raise RuntimeError("the CPU attention backend packs its heads in different orders")
                indices += regions[0] << shift
            place = indices.nonzero()[:, 0]
            order = torch.empty(size * dim, dtype=torch.int64)
            order[indices[place] - 1] = place
            if len(place) != size * dim or not torch.equal(indices[order], torch.arange(size * dim) + 1):
                raise RuntimeError("the CPU attention backend's cache layout could not be learnt")
            orders.append(order)
        return tuple(orders)


class PagedKV:
    """The KV of one request in vLLM's blocks: a `KVBuffer`.

    Parameters
    ----------
    layers : sequence of PagedLayer
    block_ids : sequence of int
        The request's blocks as the scheduler counts them, each `manager_block` tokens.
    The request's blocks as counted by the scheduler, of `manager_block` tokens each.
    """

    def __init__(self, layers: Sequence[PagedLayer], block_ids: Sequence[int], manager_block: int) -> None:
        self.layers = layers
        size, device = layers[0].block_size, layers[0].cache.device
        pieces = manager_block // size  # a kernel may see a scheduler's block as several
        ids = tensor_of(block_ids)
        self.blocks = send((ids[:, None] * pieces + torch.arange(pieces)).flatten(), device)
        self.table = self.blocks.to(torch.int32)
        self.slots = (self.blocks[:, None] * size + torch.arange(size, device=device)).flatten()
        self.updated: PromptSlots | None = None  # a calibrated CoPE model's updated slots in the prompt
        self._asked: tuple[Tensor, Tensor] | None = None

    def write(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """See `KVBuffer.write`."""
        self.layers[layer].write(self._slots_of(rows), k, v)

    def read(self, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `KVBuffer.read`."""
        return self.layers[layer].read(self._slots_of(rows))

    def _slots_of(self, rows: Tensor) -> Tensor:
        if self._asked is None or self._asked[0] is not rows:  # all layers use the same rows: computed once
            self._asked = rows, self.slots[rows]
        return self._asked[1]


class PackedSlots:
    """Slots of packed rows in one cache, computed once for all layers."""

    def __init__(self) -> None:
        self._groups: tuple[RowGroup, ...] = ()

    def of(self, groups: Sequence[RowGroup]) -> Tensor:
        """Slots [n], int64, of the rows of `groups`, whose KV is `PagedKV` over the same layers."""
        groups = tuple(groups)
        if len(groups) != len(self._groups) or any(a is not b for a, b in zip(groups, self._groups, strict=True)):
            self._groups, self._slots = groups, torch.cat([g.kv.slots[g.rows] for g in groups])
        return self._slots

    def forget(self) -> None:
        """Release the last call's requests."""
        self._groups = ()


def in_one_cache(groups: Sequence[RowGroup]) -> bool:
    """Whether the KV of all groups is paged in the same layers' caches."""
    first = groups[0].kv
    return isinstance(first, PagedKV) and all(isinstance(g.kv, PagedKV) and g.kv.layers is first.layers for g in groups)


def addresses(layers: Sequence[PagedLayer]) -> tuple[int, ...]:
    """Addresses of all layers' caches: one alone may be equal after a reallocation."""
    return tuple(layer.cache.data_ptr() for layer in layers)


class OpenLayer:
    """A cache in the open layout outside vLLM's: scratch memory for prefills."""

    def __init__(self, cache: Tensor) -> None:
        self.cache, self.block_size, self.packed = cache, cache.shape[2], False

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """See `PagedLayer.write`."""
        at = self.cache.transpose(1, 2).flatten(0, 1)
        at.index_copy_(0, slots, torch.cat((k, v), dim=-1).to(at.dtype))

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """See `PagedLayer.read`."""
        return self.cache.transpose(1, 2).flatten(0, 1)[slots].chunk(2, dim=-1)


def scratch_kv(
    layers: int, rows: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device, block: int
) -> PagedKV:
    """KV of `rows` rows [layers of (blocks, heads, block, 2 * dim)] outside vLLM's cache; unwritten rows hold NaN."""
    blocks = -(-rows // block)
    shape = (layers, blocks, block, heads, 2 * dim)
    memory = torch.full(shape, float("nan"), dtype=dtype, device=device).transpose(2, 3)
    return PagedKV([OpenLayer(x) for x in memory], range(blocks), block)
