"""Deviation of reused from recomputed KV, selection of the most deviating tokens, fusion: pure tensor functions."""

import math
from typing import Literal

import torch
from torch import Tensor

from cacheslide.errors import PolicyError

Fusion = Literal["replace", "paper", "wiener", "constant"]


def check_ratio(name: str, value: float) -> None:
    """Raise PolicyError for a share outside [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise PolicyError(f"{name} must lie in [0, 1], not {value}")


def deviation(fresh: Tensor, cached: Tensor) -> Tensor:
    """d_i = ||fresh_i - cached_i||² over heads and head_dim: [n, heads, head_dim] -> float32 [n] (Alg. 2, line 3)."""
    return (fresh.float() - cached.float()).square().sum(dim=(1, 2))


def squared_norm(cached: Tensor) -> Tensor:
    """||cached_i||² over heads and head_dim: [n, heads, head_dim] -> float32 [n]."""
    return cached.float().square().sum(dim=(1, 2))


def top_rows(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores, ascending; ties go to the earlier row, on every device and rank."""
    order = torch.sort(scores, descending=True, stable=True).indices[: max(0, min(count, scores.numel()))]
    return order.sort().values


def top_mask(scores: Tensor, count: int) -> Tensor:
    """Bool [n], true at the `count` largest of scores [n], on the host and without NaN. Ties go to the earlier row.

    The same rows as `top_rows`, without a sort: a tenth of the time for 8,192 scores.
    """
    count = max(0, min(count, len(scores)))
    if not count:
        return torch.zeros(len(scores), dtype=torch.bool)
    least = scores.kthvalue(len(scores) - count + 1).values
    mask = scores > least
    mask[(scores == least).nonzero()[: count - int(mask.sum()), 0]] = True
    return mask


def tokens_of_ratio(ratio: float, rows: int) -> int:
    """`ratio` of `rows` as a count, rounded half up for every system."""
    return min(rows, math.floor(ratio * rows + 0.5))


def fusion_weight(rule: Fusion, d: Tensor, size: Tensor, constant: float = 1.0) -> Tensor:
    """α per row, float32 [n], in [0, 1].

    Parameters
    ----------
    d : Tensor [n]
        Deviations of the rows' keys.
    size : Tensor [n]
        ||K_reuse||² of the rows; `d` and `size` are over the heads of all ranks.

    Notes
    -----
    "paper": d / ||K_reuse||² (Alg. 2), clamped to 1 since nothing in the paper bounds it. "wiener":
    d / (d + median d), a signal-to-noise weight. "replace": 1.
    """
    if rule == "replace":
        return torch.ones_like(d)
    if rule == "constant":
        return torch.full_like(d, constant)
    if rule == "paper":
        return (d / size.clamp_min(1e-12)).clamp(max=1.0)
    if rule == "wiener":
        return d / (d + d.median()).clamp_min(1e-12) if d.numel() else d
    raise PolicyError(f"unknown fusion rule {rule!r}")


def fuse(fresh: Tensor, cached: Tensor, alpha: Tensor) -> Tensor:
    """α·fresh + (1-α)·cached, row by row: [n, heads, head_dim] twice and α [n] -> [n, heads, head_dim]."""
    return torch.lerp(cached.float(), fresh.float(), alpha[:, None, None]).to(fresh.dtype)
