"""Row attention in plain PyTorch: runs on the CPU, and is the reference of the tests."""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

# Query rows per step: bounds the mask and skips most masked keys. A GPU is faster with fewer launches.
_QUERY_BLOCK, _GPU_QUERY_BLOCK = 256, 1024


def row_attention(
    q: Tensor,
    rows: Tensor,
    cu_rows: Tensor,
    block_table: Tensor,
    kv: Tensor,
    scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `cacheslide.kernels.row_attention.api.row_attention`."""
    out = torch.empty_like(q) if out is None else out
    for request, (begin, end) in enumerate(pairwise(cu_rows.tolist())):
        if begin == end:
            continue
        keys, values = paged_rows(kv, block_table[request], int(rows[end - 1]) + 1)
        for part, attended in by_blocks(q[begin:end], keys, values, rows[begin:end], scale):
            out[begin:end][part] = attended
    return out


def by_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    scale: float | None = None,
    window: int | None = None,
    on_host: Tensor | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Causal attention of one request's scattered rows, a block of query rows at a time.

    Parameters
    ----------
    q : Tensor [n, heads, head_dim]
    k, v : Tensor [keys, kv_heads, head_dim]
        K and V of row j of the prompt at index j.
    rows : Tensor [n]
        Ascending; query i attends to keys 0..rows[i].
    scale : float, optional
        Default: 1 / sqrt(head_dim).
    window : int, optional
        Query i attends only to the last `window` of these keys. Keys outside every query's window are not read.
    on_host : Tensor [n], optional
        `rows` in host memory; copied there if not given.

    Yields
    ------
    The slice of query rows, and their attention output [rows, heads, head_dim].
    """
    size = _GPU_QUERY_BLOCK if q.is_cuda else _QUERY_BLOCK
    for part, first, last in _blocks(rows.cpu() if on_host is None else on_host, window, size):
        at, own = torch.arange(first, last, device=q.device), rows[part][:, None]
        mask = at <= own
        if window is not None:
            mask &= at > own - window
        yield part, masked_attention(q[part], k[first:last], v[first:last], mask, scale)


def _blocks(rows: Tensor, window: int | None, size: int) -> Iterator[tuple[slice, int, int]]:
    """Slices of at most `size` of `rows` [n] (ascending, on the host), and the range [first, last) of keys of each."""
    ends = [len(rows)]
    if window is not None:  # keys between two windows belong to no query: a block must not span them
        ends = [*(torch.nonzero(rows.diff() > window)[:, 0] + 1).tolist(), len(rows)]
    begin = 0
    for end in ends:
        for at in range(begin, end, size):
            part = slice(at, min(at + size, end))
            first = 0 if window is None else max(0, int(rows[at]) + 1 - window)
            yield part, first, int(rows[part.stop - 1]) + 1
        begin = end


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Attention where `mask`, bool [n, keys], is set.

    q [n, heads, head_dim] over k, v [keys, kv_heads, head_dim] -> [n, heads, head_dim]. Masked keys enter every sum
    with weight 0, so they must not be NaN.
    """
    if q.is_cuda and q.shape[1] != k.shape[1]:
        return grouped_attention(q, k, v, mask, scale)
    queries, keys, values = (t.transpose(0, 1)[None] for t in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(queries, keys, values, mask, scale=scale, enable_gqa=grouped)
    return out[0].transpose(0, 1)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """As `masked_attention`, with KV heads as the batch dimension, so that query heads share them without a copy.

    On a GPU only PyTorch's slowest kernel supports a mask together with grouped heads.
    """
    kv_heads = k.shape[1]
    queries = q.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    keys, values = (t.transpose(0, 1)[:, None].expand(-1, queries.shape[1], -1, -1) for t in (k, v))
    out = F.scaled_dot_product_attention(queries, keys, values, mask, scale=scale)
    return out.permute(2, 0, 1, 3).flatten(1, 2)


def paged_rows(kv: Tensor, blocks: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Keys and values [count, kv_heads, head_dim] of rows 0..count-1 of the request with the block ids `blocks`."""
    needed = blocks[: -(-count // kv.shape[2])].long()
    both = kv[needed].transpose(1, 2).flatten(0, 1)[:count]
    return both.chunk(2, dim=-1)
