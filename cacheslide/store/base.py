"""The store's interface and its unit, the KV of one chunk."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from cacheslide.core.keys import ChunkKey
from cacheslide.errors import StoreError

MAX_GENERATION = 3  # corrected KV is kept up to this generation unless a server or a store says otherwise


@dataclass(frozen=True)
class ChunkKV:
    """The KV of one chunk of n tokens, as it was computed.

    Attributes
    ----------
    k, v : Tensor [layers, n, kv_heads, head_dim]
        Keys rotated at `positions`.
    positions : Tensor [n], int64
        The position indices the chunk was encoded at.
    layer_inputs : dict of int to Tensor [n, hidden_size]
        Inputs of the probe layers, where a promoting policy asked for them.
    generation : int
        0 for exactly computed KV; corrected KV that is kept counts how often it was built on corrected KV.
    scores : Tensor [n], float32, on the host, optional
        Remembered deviation: how far each token's KV was from that of another context, summed over layers
        (`core/remembering.py`); finite and at least 0.
    notes : dict of str to Tensor
        What the policy's memory keeps beside the chunk (`policies/memory.py`). Stores in memory and in a folder of one
        file a chunk keep them; tiers and serving keep a chunk without.
    """

    k: Tensor
    v: Tensor
    positions: Tensor
    layer_inputs: dict[int, Tensor] = field(default_factory=dict)
    generation: int = 0
    scores: Tensor | None = None
    notes: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.positions)
        if self.k.shape != self.v.shape or self.k.dim() != 4 or self.k.shape[1] != n:
            raise StoreError(f"chunk shapes disagree: k {tuple(self.k.shape)}, v {tuple(self.v.shape)}, {n} positions")
        if any(len(x) != n for x in self.layer_inputs.values()):
            raise StoreError(f"layer inputs must hold {n} rows each")
        if self.scores is not None and (why := bad_scores(self.scores, n)):
            raise StoreError(why)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [self.k, self.v, self.positions, *self.layer_inputs.values(), *self.notes.values()]
        tensors += [] if self.scores is None else [self.scores]
        return sum(t.numel() * t.element_size() for t in tensors)

    def to(self, dtype: torch.dtype) -> "ChunkKV":
        """The same chunk with K, V and layer inputs in `dtype`, in memory of its own."""
        return ChunkKV(
            self.k.to(dtype, copy=True),
            self.v.to(dtype, copy=True),
            self.positions.clone(),
            {layer: x.to(dtype, copy=True) for layer, x in self.layer_inputs.items()},
            self.generation,
            self.scores,
            self.notes,
        )


def bad_scores(scores: Tensor, tokens: int) -> str:
    """Why these are not the scores of a chunk of `tokens` tokens, in one line; empty when they are."""
    if scores.shape != (tokens,) or scores.dtype != torch.float32:
        return f"scores must be float32 [{tokens}], not {scores.dtype} {tuple(scores.shape)}"
    return "" if bool((scores.isfinite() & (scores >= 0)).all()) else "scores must be finite and at least 0"


@dataclass(frozen=True)
class Fetched:
    """A chunk and the lowest tier it was read from, or why there is none (`why` goes into the request's receipt)."""

    chunk: ChunkKV | None
    tier: str = ""
    why: str = ""


@dataclass
class StoreStats:
    """Counts since the store was opened."""

    hits: int = 0
    misses: int = 0
    puts: int = 0
    evictions: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    damaged: int = 0


class Fits(Protocol):
    """What the chunks of a model look like (`ChunkShape`)."""

    def misfit_of(self, chunk: ChunkKV, tokens: int | None = None) -> str:
        """Why `chunk` is none of them, or does not have `tokens` tokens; empty when it is."""
        ...


class ChunkStore(ABC):
    """Maps chunk keys to `ChunkKV`. A key names its content: putting it twice is harmless."""

    def __init__(self) -> None:
        self.stats = StoreStats()

    @abstractmethod
    def contains(self, key: ChunkKey) -> bool:
        """Whether `get` would find the chunk; changes nothing."""

    @abstractmethod
    def get(self, key: ChunkKey) -> ChunkKV | None:
        """The chunk, or None when it is not (or no longer) here."""

    def fetch(self, key: ChunkKey, shape: "Fits | None" = None, tokens: int | None = None) -> Fetched:
        """`get`, or why not. A chunk of another shape, or of another number of tokens, is none."""
        chunk = self.get(key)
        if chunk is None:
            return Fetched(None, why="absent")
        if shape is not None and (why := shape.misfit_of(chunk, tokens)):
            return Fetched(None, why=f"misfit: {why}")
        return Fetched(chunk)

    def missed(self, why: str) -> Fetched:
        """Count a miss."""
        self.stats.misses += 1
        return Fetched(None, why=why)

    @abstractmethod
    def put(self, key: ChunkKey, chunk: ChunkKV) -> None:
        """Keep the chunk; StoreError when it can never fit."""

    def rescore(self, key: ChunkKey, scores: Tensor, of: ChunkKV | None = None) -> bool:
        """Give a chunk in memory other scores, float32 [n], on the host; whether it has them now.

        With `of`, the chunk as it was read, nothing is done where the key has other KV by now. Files and servers keep
        the scores that a chunk was written with. StoreError for scores that are not the chunk's.
        """
        return False

    def replace(self, key: ChunkKey, chunk: ChunkKV) -> bool:
        """Keep `chunk` in place of what is here under its key; whether that was done.

        False where nothing is here under the key, and of stores that write a chunk once: they keep what they have.
        """
        return False

    @abstractmethod
    def __len__(self) -> int:
        """Chunks held."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held."""
