"""Row attention in plain PyTorch: what the CPU runs and what the tests compare with."""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

_QUERY_BLOCK = 256  # query rows a call handles at once: bounds the mask and skips most masked keys


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
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, scale: float | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Causal attention of one request's scattered rows, a block of query rows at a time.

    Parameters
    ----------
    q : Tensor [n, heads, head_dim]
    k, v : Tensor [keys, kv_heads, head_dim]
        Row j of the prompt at index j.
    rows : Tensor [n]
        Ascending; query i attends to keys 0..rows[i].
    scale : float, optional
        Default: 1 / sqrt(head_dim).

    Yields
    ------
    The slice of query rows, and what they attend to [rows, heads, head_dim].
    """
    queries, keys, values = (t.transpose(0, 1)[None] for t in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    for at in range(0, len(q), _QUERY_BLOCK):
        part = slice(at, min(at + _QUERY_BLOCK, len(q)))
        last = int(rows[part.stop - 1]) + 1
        mask = torch.arange(last, device=q.device) <= rows[part][:, None]
        attended = F.scaled_dot_product_attention(
            queries[:, :, part], keys[:, :, :last], values[:, :, :last], mask, scale=scale, enable_gqa=grouped
        )
        yield part, attended[0].transpose(0, 1)


def paged_rows(kv: Tensor, blocks: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Keys and values [count, kv_heads, head_dim] of a request's rows 0..count-1, whose blocks are `blocks`."""
    needed = blocks[: -(-count // kv.shape[2])].long()
    both = kv[needed].transpose(1, 2).flatten(0, 1)[:count]
    return both.chunk(2, dim=-1)
