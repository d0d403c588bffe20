"""Which reused rows are recomputed, and how old and new KV are merged: pure tensor functions and their settings.

WCA (paper section 4.3, Alg. 2) is `TopDeviation`; EPIC is `EdgeRows`; plain reuse is `NoCorrection`. The
paper's ambiguous points are options here, so that they can be measured: the fusion rule, the reading of
"converged", the layer whose keys are compared, and what a token that enters late starts from.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from cacheslide.errors import PolicyError

Fusion = Literal["replace", "paper", "wiener", "constant"]


def _share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise PolicyError(f"{name} must lie in [0, 1], not {value}")


@dataclass(frozen=True)
class NoCorrection:
    """Reused rows stay as they were placed."""

    def at_share(self, share: float) -> "NoCorrection":
        """Nothing to scale: no row is recomputed at any share."""
        return self


@dataclass(frozen=True)
class EdgeRows:
    """EPIC: the first `head` and last `tail` rows of every chunk; with `share`, that share of it, half at each edge."""

    head: int = 32
    tail: int = 32
    share: float | None = None

    def __post_init__(self) -> None:
        if self.head < 0 or self.tail < 0:
            raise PolicyError("head and tail must be at least 0")
        if self.share is not None:
            _share("share", self.share)

    def edges(self, length: int) -> tuple[int, int]:
        """Rows recomputed at the start and at the end of a chunk of `length` rows."""
        if self.share is None:
            return self.head, self.tail
        n = round(self.share * length)
        return n - n // 2, n // 2

    def at_share(self, share: float) -> "EdgeRows":
        """The same rule recomputing `share` of every chunk."""
        return replace(self, share=share)


@dataclass(frozen=True)
class Swap:
    """Alg. 2, step 3: every `every` layers converged rows leave for good and the next by deviation enter.

    reading "distance": converged when 1 - CKSim < tau (CKSim is a similarity, so this is the sensible one);
    "literal": when CKSim < tau, as the text prints it. start, which the paper leaves open: an entering row goes on from
    its state at the selection layer, where it "stopped", or from its cached "inputs" of this layer, which the chunks
    must hold.
    """

    tau: float = 0.12
    every: int = 4
    reading: Literal["distance", "literal"] = "distance"
    start: Literal["stopped", "inputs"] = "stopped"

    def __post_init__(self) -> None:
        if self.every < 1:
            raise PolicyError(f"swap.every must be at least 1, not {self.every}")

    def converged(self, similarity: Tensor) -> Tensor:
        """Bool [n] from the CKSim [n] of fresh and cached keys, over the heads of all ranks."""
        return (1 - similarity < self.tau) if self.reading == "distance" else (similarity < self.tau)


@dataclass(frozen=True)
class Promotion:
    """After `layer`, the `share` of reused rows that deviates most joins, restarted from its cached layer input."""

    layer: int
    share: float

    def __post_init__(self) -> None:
        _share("promotion share", self.share)


@dataclass(frozen=True)
class TopDeviation:
    """WCA and CacheBlend: recompute the reused rows whose KV deviates most at layer `layer`.

    Layers below `layer` (0-based) are computed in full. `share` is a share of the reused rows. `constant` is the
    weight of the "constant" fusion. `promote` adds rows at later layers and needs cached layer inputs.
    """

    share: float
    layer: int = 1
    metric: Literal["k", "v", "kv"] = "k"
    fusion: Fusion = "replace"
    constant: float = 1.0
    swap: Swap | None = None
    promote: tuple[Promotion, ...] = ()

    def __post_init__(self) -> None:
        _share("share", self.share)
        _share("constant", self.constant)
        if self.layer < 0:
            raise PolicyError(f"layer must be at least 0, not {self.layer}")
        layers = [p.layer for p in self.promote]
        if layers != sorted(set(layers)) or (layers and layers[0] < self.layer):
            raise PolicyError("promotion layers must be increasing and not lie below the selection layer")
        if self.swap and self.promote:
            raise PolicyError("swap and promotion are two answers to one question: choose one")

    def at_share(self, share: float) -> "TopDeviation":
        """The same rule recomputing `share` of the reused rows in the end, its promotions scaled along."""
        total = self.share + sum(p.share for p in self.promote)
        if not self.promote or not total:
            return replace(self, share=share)
        scale = share / total  # 1.0, exactly, at the rule's own share
        return replace(
            self, share=self.share * scale, promote=tuple(replace(p, share=p.share * scale) for p in self.promote)
        )


Correction = NoCorrection | EdgeRows | TopDeviation


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


def rows_of_share(share: float, rows: int) -> int:
    """A share of `rows` as a count: rounded half up, so that every system rounds alike."""
    return min(rows, math.floor(share * rows + 0.5))


def fusion_weight(rule: Fusion, d: Tensor, size: Tensor, constant: float = 1.0) -> Tensor:
    """α per row, float32 [n], in [0, 1].

    Parameters
    ----------
    d : Tensor [n]
        Deviations of the rows' keys.
    size : Tensor [n]
        ||K_reuse||² of the rows; both over the heads of all ranks.

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
