"""Row attention in plain PyTorch: what the CPU runs and what the tests compare with."""

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
    grouped = q.shape[1] != kv.shape[1]
    for request, (begin, end) in enumerate(pairwise(cu_rows.tolist())):
        if begin == end:
            continue
        keys, values = paged_rows(kv, block_table[request], int(rows[end - 1]) + 1)
        keys, values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
        for at in range(begin, end, _QUERY_BLOCK):
            part = slice(at, min(at + _QUERY_BLOCK, end))
            last = int(rows[part.stop - 1]) + 1
            mask = torch.arange(last, device=q.device) <= rows[part][:, None]
            attended = F.scaled_dot_product_attention(
                q[part].transpose(0, 1)[None],
                keys[:, :, :last],
                values[:, :, :last],
                mask,
                scale=scale,
                enable_gqa=grouped,
            )
            out[part] = attended[0].transpose(0, 1)
    return out


def paged_rows(kv: Tensor, blocks: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Keys and values [count, kv_heads, head_dim] of a request's rows 0..count-1, whose blocks are `blocks`."""
    needed = blocks[: -(-count // kv.shape[2])].long()
    both = kv[needed].transpose(1, 2).flatten(0, 1)[:count]
    return both.chunk(2, dim=-1)
