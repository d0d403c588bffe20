"""CoPE attention over a paged KV cache: Triton on CUDA, plain PyTorch elsewhere.

Keys in the cache are not rotated; everything else is as in `cacheslide.kernels.api`: `kv` is vLLM's view [blocks,
kv_heads, block_size, 2 * head_dim], a key beside its value. `training.py` holds the differentiable form.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from cacheslide.kernels.cope import reference as cope_reference
from cacheslide.positions.ccpe import SlotOffsets


def cope_attention(
    q: Tensor,
    rows: Tensor,
    cu_rows: Tensor,
    block_table: Tensor,
    kv: Tensor,
    embedding: Tensor,
    scale: float | None = None,
    out: Tensor | None = None,
    max_row: int | None = None,
    slots: SlotOffsets | None = None,
) -> Tensor:
    """Causal CoPE attention of scattered query rows of several requests over their paged KV.

    Parameters
    ----------
    q, rows, cu_rows, block_table, kv, scale, out, max_row
        As in `cacheslide.kernels.api.row_attention`; keys are not rotated.
    embedding : Tensor [p_max, head_dim], of q's dtype
        The layer's position embeddings, shared by its heads; p_max at least 2.
    slots : SlotOffsets, optional
        Updated slots that queries of fixed chunks cross by their canonical offset (CCPE).

    Returns
    -------
    Tensor [n, heads, head_dim], of q's dtype

    Notes
    -----
    No tensor of size (queries × keys) is allocated; scratch on CUDA is 4 * p_max bytes a query and head.
    """
    return CopeAttention(rows, cu_rows, block_table, scale, max_row, slots)(q, kv, embedding, out)


class CopeAttention:
    """`cope_attention` of one set of rows in every layer: checks and arguments common to layers are made once.

    Parameters
    ----------
    rows, cu_rows, block_table, scale, max_row, slots
        See `cope_attention`. Their numbers may change between calls; `max_row` is then an upper bound. Queries behind
        the last of `cu_rows` are not computed, and their outputs are undefined.
    """

    def __init__(
        self,
        rows: Tensor,
        cu_rows: Tensor,
        block_table: Tensor,
        scale: float | None = None,
        max_row: int | None = None,
        slots: SlotOffsets | None = None,
    ) -> None:
        if scale is not None and scale <= 0:
            raise ValueError(f"scale must be above 0, not {scale}")
        self.shared, self.scale, self.max_row, self.slots = (rows, cu_rows, block_table), scale, max_row, slots
        self._form: tuple | None = None  # the tensors' shapes, strides and dtypes in the previous call
        self._launch = None

    def __call__(
        self, q: Tensor, kv: Tensor, embedding: Tensor, out: Tensor | None = None, offsets: Tensor | None = None
    ) -> Tensor:
        """Attention of `q` [n, heads, head_dim] over one layer's cache and position table.

        `offsets` [slots, heads] are the layer's; they replace those in `slots`.
        """
        tensors = (q, kv, embedding) if out is None else (q, kv, embedding, out)
        form = *((x.shape, x.stride(), x.dtype) for x in tensors), offsets is None or offsets.shape
        if form != self._form:
            _check(q, kv, embedding, out)
            self._check_slots(q, offsets)
            self._launch, self._form = self._bind(q, kv, embedding, out), form
        return self._launch(q, kv, embedding, out, offsets)

    def _check_slots(self, q: Tensor, offsets: Tensor | None) -> None:
        slots = self.slots
        if slots is None:
            return
        shape = (slots.offsets if offsets is None else offsets).shape
        if shape != (len(slots.bounds), q.shape[1]) or len(slots.canonical) != len(q):
            raise ValueError(f"slot offsets {tuple(shape)} or canonical rows do not fit queries {tuple(q.shape)}")

    def _bind(self, q: Tensor, kv: Tensor, embedding: Tensor, out: Tensor | None) -> Callable[..., Tensor]:
        rows, cu_rows, table = self.shared
        if q.is_cuda:
            from cacheslide.kernels.cope import launch as cope_launch

            fixed = rows, cu_rows, cope_launch.paged(kv, table), embedding, self.scale, out, self.max_row, self.slots
            launch, dim = cope_launch.CopeLaunch(q, *fixed), q.shape[2]
            return lambda q, kv, *rest: launch(q, *kv.split(dim, -1), *rest)

        def attend(q: Tensor, kv: Tensor, embedding: Tensor, out: Tensor | None, offsets: Tensor | None) -> Tensor:
            slots = self.slots
            slots = slots if slots is None or offsets is None else replace(slots, offsets=offsets)
            return cope_reference.cope_attention(q, rows, cu_rows, table, kv, embedding, self.scale, out, slots)

        return attend


def cope_decode(
    q: Tensor,
    rows: Tensor,
    block_table: Tensor,
    kv: Tensor,
    embedding: Tensor,
    scale: float | None = None,
    out: Tensor | None = None,
    max_row: int | None = None,
) -> Tensor:
    """CoPE attention of one query row a request: `cope_attention` with q [requests, heads, head_dim], split over keys.

    A decoded row never belongs to a fixed chunk, so it crosses slots by live gates. It does not synchronise with the
    host, and the launch depends on shapes and `max_row` alone, so it can be captured in a CUDA graph.
    """
    if scale is not None and scale <= 0:
        raise ValueError(f"scale must be above 0, not {scale}")
    _check(q, kv, embedding, out)
    if len(q) != len(block_table) or len(q) != len(rows):
        raise ValueError(f"{len(q)} queries, {len(rows)} rows and {len(block_table)} requests: decoding takes one each")
    if not q.is_cuda:
        bounds = torch.arange(len(q) + 1)
        return cope_reference.cope_attention(q, rows, bounds, block_table, kv, embedding, scale, out)
    from cacheslide.kernels.cope import decode as cope_decode
    from cacheslide.kernels.cope import launch as cope_launch

    blocks = cope_launch.paged(kv, block_table)
    return cope_decode.cope_decode(q, rows, blocks, embedding, scale, out, max_row)


def _check(q: Tensor, kv: Tensor, embedding: Tensor, out: Tensor | None) -> None:
    if not q.dtype == kv.dtype == embedding.dtype:
        raise ValueError(f"queries are {q.dtype}, the cache holds {kv.dtype}, the position table {embedding.dtype}")
    if q.shape[2] * 2 != kv.shape[3] or q.shape[1] % kv.shape[1]:
        raise ValueError(f"queries {tuple(q.shape)} do not fit a cache {tuple(kv.shape)}")
    if embedding.dim() != 2 or embedding.shape[1] != q.shape[2] or embedding.shape[0] < 2:
        raise ValueError(f"a position table {tuple(embedding.shape)} is not [p_max >= 2, {q.shape[2]}]")
    contiguous = all(x is None or x.stride(-1) == 1 for x in (q, kv, embedding, out))
    if not contiguous:
        raise ValueError("the last dimension of queries, cache, position table and output must be contiguous")
