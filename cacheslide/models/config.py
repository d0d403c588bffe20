"""The configuration of a decoder: everything in which supported families differ, as data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from cacheslide.errors import ModelError
from cacheslide.plain_values import shown

# Above any real model: a damaged count must not fill memory or cause hours of work before an error.
MOST = {"num_layers": 4096, "max_positions": 2**22}
MOST_OTHERWISE = 2**31 - 1


def check_count(name: str, count: Any) -> int:
    """`count` as the size `name` of a model; ModelError unless it is an integer from 1 to the limit."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ModelError(f"{name} must be a count of at least 1, not {shown(count)}")
    if count > (most := MOST.get(name, MOST_OTHERWISE)):
        raise ModelError(f"{name} must be at most {most}, not {shown(count)}")
    return count


@dataclass(frozen=True)
class Rope:
    """A layer's rotation: its base, and the checkpoint's own scaling dict or None."""

    theta: float
    scaling: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.theta < math.inf:
            raise ModelError(f"the base of a rotation must be a number above 0, not {self.theta!r}")


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer with rotary positions and gated MLPs. Sizes are counts.

    Attributes
    ----------
    ropes : tuple of Rope
        One per layer.
    windows : tuple of int or None
        One per layer: a token attends to this many tokens up to itself, or to all of them (None).
    qkv_bias : bool
        Projections of queries, keys and values have a bias.
    qk_norm : bool
        Queries and keys are RMS-normed per head before rotation.
    sandwich_norms : bool
        The outputs of attention and MLP are normed before they are added to the residual stream.
    unit_offset_norms : bool
        Norm weights w are stored for a factor of 1 + w.
    activation : str
        Activation of the MLP's gate: a name in `models.reference.ACTIVATIONS`.
    embedding_scale : float
        Factor on the embeddings.
    attention_scale : float or None
        Factor on the scores; None is 1 / sqrt(head_dim).
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    ropes: tuple[Rope, ...]
    windows: tuple[int | None, ...]
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False
    unit_offset_norms: bool = False
    activation: str = "silu"
    embedding_scale: float = 1.0
    attention_scale: float | None = None

    def __post_init__(self) -> None:
        counts = {f.name: getattr(self, f.name) for f in fields(self) if f.type == "int" or f.type is int}
        counts |= {f"window of layer {i}": window for i, window in enumerate(self.windows) if window is not None}
        for name, count in counts.items():
            check_count(name, count)
        if not 0 <= self.rms_norm_eps < math.inf:
            raise ModelError(f"rms_norm_eps must be a number of at least 0, not {self.rms_norm_eps!r}")
        scale = self.attention_scale
        if scale is not None and not (isinstance(scale, float) and 0 < scale < math.inf):
            raise ModelError(f"the factor of the scores must be a number above 0, not {scale!r}")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(f"{self.num_heads} heads cannot share {self.num_kv_heads} KV heads evenly")
        if not len(self.ropes) == len(self.windows) == self.num_layers:
            lengths = f"{len(self.ropes)} rotations and {len(self.windows)} windows"
            raise ModelError(f"{lengths} do not fit {self.num_layers} layers")

    @property
    def is_plain(self) -> bool:
        """Whether layers are Llama's: no bias, one norm before attention and one before the MLP, no window."""
        extras = self.qkv_bias or self.qk_norm or self.sandwich_norms or self.unit_offset_norms
        scaled = self.embedding_scale != 1.0 or self.attention_scale is not None or self.activation != "silu"
        return not extras and not scaled and not any(self.windows)
