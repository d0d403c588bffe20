"""CoPE, contextual position encoding (Golovneva et al., arXiv 2405.18719), in plain PyTorch.

Query i and key j <= i: gate g_ij = sigmoid(q_i·k_j / sqrt(d)); position p_ij = sum of g_ik for k = j..i, at most
p_max - 1; the score gains an entry interpolated from the position logits z_i = table·q_i at p_ij. Keys are not rotated,
so cached keys hold at any row. The functions take a block of queries at a time, so that the number of (query, key)
pairs in memory is bounded.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cacheslide.positions.ccpe import SlotOffsets, positions_with_offsets, suffix_sum

_PAIRS = 1 << 23  # (head, query, key) triples of a block: 32 MiB a float32 tensor


def cope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    rows: Tensor,
    scale: float | None = None,
    slots: SlotOffsets | None = None,
) -> Tensor:
    """Causal CoPE attention of scattered query rows of one request.

    Parameters
    ----------
    q : Tensor [n, heads, head_dim]
    k, v : Tensor [keys, kv_heads, head_dim]
        K and V of row j of the prompt at index j, not rotated; only rows up to the last query's are read.
    table : Tensor [p_max, head_dim]
        Position embeddings, shared by the heads.
    rows : Tensor [n], ascending
        Query i attends to keys 0..rows[i].
    scale : float, optional
        Factor on q·k, for scores and gates; 1 / sqrt(head_dim) by default.
    slots : SlotOffsets, optional
        Canonical offsets of this request's updated slots.

    Returns
    -------
    Tensor [n, heads, head_dim], of q's dtype; computed in float32 (float64 for float64)
    """
    out, saves = [], torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, table))
    for part, end in query_blocks(rows, q.shape[1]):
        own_slots = None if slots is None else slots.of(0, part)
        args = (q[part], k[:end], v[:end], table, rows[part], scale, own_slots)
        out.append(checkpoint(_block, *args, use_reentrant=False) if saves else _block(*args))
    return torch.cat(out) if out else torch.empty_like(q)


def query_blocks(rows: Tensor, heads: int) -> list[tuple[slice, int]]:
    """Cut ascending query rows into blocks of bounded size: (slice of rows, number of visible keys) of each."""
    blocks, at, listed = [], 0, rows.tolist()
    while at < len(listed):
        stop = min(len(listed), at + max(1, _PAIRS // (heads * (listed[at] + 1))))
        while stop > at + 1 and (stop - at) * heads * (listed[stop - 1] + 1) > _PAIRS:
            stop = at + (stop - at + 1) // 2
        blocks.append((slice(at, stop), listed[stop - 1] + 1))
        at = stop
    return blocks


def scores_and_gates(q: Tensor, k: Tensor, rows: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Scaled scores [heads, n, keys] and gates, which are 0 for keys behind the query; float32 or float64."""
    kind = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    queries = q.to(kind).transpose(0, 1).unflatten(0, (-1, group))
    keys = k.to(kind).permute(1, 2, 0)[:, None]
    scores = (queries @ keys).flatten(0, 1) * (q.shape[2] ** -0.5 if scale is None else scale)
    seen = torch.arange(k.shape[0], device=rows.device) <= rows[:, None]
    return scores, torch.where(seen, scores.sigmoid(), torch.zeros_like(scores))


def contextual_positions(gates: Tensor, rows: Tensor, p_max: int, slots: SlotOffsets | None = None) -> Tensor:
    """Positions [heads, n, keys] from gates [heads, n, keys], clamped to p_max - 1."""
    p = suffix_sum(gates) if slots is None else positions_with_offsets(gates, rows, slots)
    return p.clamp(max=p_max - 1)


def interpolate(logits: Tensor, positions: Tensor) -> Tensor:
    """Entries of position logits [heads, n, p_max] at real-valued positions [heads, n, keys], linearly between two."""
    low = positions.floor()
    index = low.long()
    below = logits.gather(-1, index)
    above = logits.gather(-1, (index + 1).clamp(max=logits.shape[-1] - 1))
    return below + (positions - low) * (above - below)


def _block(q, k, v, table, rows, scale, slots) -> Tensor:
    scores, gates = scores_and_gates(q, k, rows, scale)
    kind, group = scores.dtype, q.shape[1] // k.shape[1]
    logits = q.to(kind).transpose(0, 1) @ table.to(kind).t()
    scores = scores + interpolate(logits, contextual_positions(gates, rows, table.shape[0], slots))
    unseen = torch.arange(k.shape[0], device=rows.device) > rows[:, None]
    weights = scores.masked_fill(unseen, float("-inf")).softmax(-1).unflatten(0, (-1, group))
    out = weights @ v.to(kind).transpose(0, 1)[:, None]
    return out.flatten(0, 1).transpose(0, 1).to(q.dtype)
