"""CoPE attention over a paged cache in plain PyTorch: runs on the CPU, and is the reference of the kernels' tests."""

from itertools import pairwise

import torch
from torch import Tensor

from cacheslide.kernels.row_attention.reference import paged_rows
from cacheslide.positions import cope
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
    slots: SlotOffsets | None = None,
) -> Tensor:
    """See `cacheslide.kernels.cope.api.cope_attention`."""
    out = torch.empty_like(q) if out is None else out
    for request, (begin, end) in enumerate(pairwise(cu_rows.tolist())):
        if begin == end:
            continue
        part = slice(begin, end)
        keys, values = paged_rows(kv, block_table[request], int(rows[end - 1]) + 1)
        own_slots = None if slots is None else slots.of(request, part)
        out[part] = cope.cope_attention(q[part], keys, values, embedding, rows[part], scale, own_slots)
    return out
