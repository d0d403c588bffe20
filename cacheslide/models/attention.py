"""Attention of scattered query rows over plain tensors: PyTorch's causal path where applicable, otherwise by blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cacheslide.kernels.row_attention.reference import by_blocks, masked_attention


def row_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    scale: float | None = None,
    window: int | None = None,
    on_host: Tensor | None = None,
) -> Tensor:
    """Causal attention of scattered query rows.

    Parameters
    ----------
    q : Tensor [n, heads, head_dim]
    k, v : Tensor [keys, kv_heads, head_dim]
        K and V of row j of the prompt at index j; only rows up to `rows.max()` are read.
    rows : Tensor [n]
        Ascending; query i attends to keys 0..rows[i].
    scale : float, optional
        Default: 1 / sqrt(head_dim).
    window : int, optional
        Query i attends only to the last `window` of these keys; keys outside every window are not read.
    on_host : Tensor [n], optional
        `rows` in host memory; without it they are copied there, which waits for the device.

    Returns
    -------
    Tensor [n, heads, head_dim]
    """
    on_host = rows.cpu() if on_host is None else on_host
    n, last = len(rows), int(on_host[-1]) + 1
    missing = last - n
    if 4 * missing <= n and int(on_host[0]) == missing and (window is None or last <= window):
        # (Nearly) the whole prompt: PyTorch's causal path skips the upper triangle, but needs a square.
        queries, keys, values = (t.transpose(0, 1)[None] for t in (q, k[:last], v[:last]))
        queries, grouped = F.pad(queries, (0, 0, missing, 0)), q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=last > 1, scale=scale, enable_gqa=grouped)
        return out[0, :, missing:].transpose(0, 1)
    return torch.cat([attended for _, attended in by_blocks(q, k, v, rows, scale, window, on_host)])


def narrow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    open: Tensor,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of each row to the rows of `open` up to its own, and to itself.

    Parameters
    ----------
    q : Tensor [n, heads, head_dim]
    k, v : Tensor [keys, kv_heads, head_dim]
        As in `row_attention`; only `rows` and `open` are read.
    rows : Tensor [n]
    open : Tensor [m]
        Disjoint from `rows`.

    Returns
    -------
    Tensor [n, heads, head_dim]
    """
    own, keys = rows[:, None], torch.cat((open, rows))
    mask = torch.cat((open <= own, rows == own), dim=1)
    if window is not None:
        mask &= keys > own - window
    return masked_attention(q, k[keys], v[keys], mask, scale)
