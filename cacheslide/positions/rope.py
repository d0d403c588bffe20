"""Rotary position embedding (RoFormer, arXiv 2104.09864) in the Hugging Face half-split layout, and delta rotation.

A key rotated at position p becomes the key at position p' by one more rotation by p' - p. Moving cached KV needs
nothing else, and is exact up to rounding.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cacheslide.errors import ModelError
from cacheslide.plain_values import shown

KNOWN_ROPE_TYPES = ("default", "linear", "llama3")


def inverse_frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any] | None = None) -> Tensor:
    """Inverse frequencies [head_dim / 2], float64, after the checkpoint's `rope_scaling`.

    `default` is the RoFormer schedule, `linear` divides positions by `factor`, `llama3` is Llama 3.1's
    wavelength-dependent interpolation. Others (yarn, longrope, dynamic) change the attention scale or depend
    on the sequence length, which a delta rotation cannot undo; they are refused by name.
    """
    if head_dim % 2:
        raise ModelError(f"head_dim must be even for RoPE, not {head_dim}")
    inv = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    kind = str((scaling or {}).get("rope_type", (scaling or {}).get("type", "default")))
    if kind == "default":
        return inv
    if kind == "linear":
        return inv / _number(scaling, "factor")
    if kind == "llama3":
        return _llama3(inv, scaling)
    raise ModelError(f"rope_scaling type {kind!r} is not supported (known: {', '.join(KNOWN_ROPE_TYPES)})")


def _llama3(inv: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    factor, old = _number(scaling, "factor"), _number(scaling, "original_max_position_embeddings")
    low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    if low >= high:
        raise ModelError(f"rope_scaling's low_freq_factor must be below its high_freq_factor, not {low} and {high}")
    wavelength = 2 * math.pi / inv
    smooth = ((old / wavelength - low) / (high - low)).clamp(0, 1)
    blended = (1 - smooth) * inv / factor + smooth * inv
    return torch.where(wavelength > old / low, inv / factor, torch.where(wavelength < old / high, inv, blended))


def _number(scaling: Mapping[str, Any], key: str) -> float:
    value = scaling.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ModelError(f"rope_scaling needs {key}, a number above 0, not {shown(value)}")
    return float(value)


class Rotary:
    """Rotates queries and keys at given positions.

    Parameters
    ----------
    inv_freq : Tensor [head_dim / 2]
    max_positions : int
        Length of the cosine table, which covers rotations by up to ± that many positions.
    """

    def __init__(self, inv_freq: Tensor, max_positions: int, device: torch.device | str = "cpu") -> None:
        angles = torch.arange(max_positions, dtype=torch.float64)[:, None] * inv_freq.double()
        self.max_positions = max_positions
        self.cos, self.sin = angles.cos().float().to(device), angles.sin().float().to(device)

    def rotate(self, x: Tensor, by: Tensor) -> Tensor:
        """Rotate `x` [n, heads, head_dim] by `by` [n] positions (negative turns back); computed in float32."""
        at = by.abs()
        cos = self.cos[at][:, None]
        sin = (self.sin[at] * by.sign()[:, None])[:, None]
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    def move(self, k: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Delta rotation: keys [n, heads, head_dim] rotated at `source` [n], as if rotated at `target` [n]."""
        if torch.equal(source, target):
            return k
        return self.rotate(k, target - source)
