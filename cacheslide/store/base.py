"""The store's interface and its unit, the KV of one chunk."""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from cacheslide.core.keys import ChunkKey
from cacheslide.errors import StoreError

NOTE_NAME = re.compile(r"[a-z_]{1,32}")
_NOTE_DTYPES = (torch.int64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
MAX_GENERATION = 3  # highest generation of stored corrected KV, unless a server or a store sets another


@dataclass(frozen=True)
class ChunkKV:
    """The KV of one chunk of n tokens, as it was computed.

    Attributes
    ----------
    k, v : Tensor [layers, n, kv_heads, head_dim]
        Keys rotated at `positions`.
    positions : Tensor [n], int64
        Position indices that the chunk was encoded at.
    layer_inputs : dict of int to Tensor [n, hidden_size]
        Inputs of the probe layers, where a promoting policy asked for them.
    generation : int
        0 for exactly computed KV; otherwise how many times in a row corrected KV was computed over corrected KV.
    scores : Tensor [n], float32, on the host, optional
        Remembered deviation of each token's KV, summed over layers (`core/remembering.py`); finite and at least 0.
    notes : dict of str to Tensor
        Tensors of the policy's memory (`policies/memory.py`). The in-memory store and `DirectoryChunkStore` store them;
        storage tiers and serving drop them.
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
        if self.notes and (why := bad_notes(self.notes)):
            raise StoreError(why)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [self.k, self.v, self.positions, *self.layer_inputs.values(), *self.notes.values()]
        tensors += [] if self.scores is None else [self.scores]
        return sum(t.numel() * t.element_size() for t in tensors)

    def to(self, dtype: torch.dtype) -> "ChunkKV":
        """The same chunk with K, V and layer inputs in `dtype`, copied."""
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
    """Why these are not valid scores for a chunk of `tokens` tokens, in one line; empty if they are."""
    if scores.shape != (tokens,) or scores.dtype != torch.float32:
        return f"scores must be float32 [{tokens}], not {scores.dtype} {tuple(scores.shape)}"
    return "" if bool((scores.isfinite() & (scores >= 0)).all()) else "scores must be finite and at least 0"


def bad_notes(notes: dict[str, Tensor]) -> str:
    """Why no store could give these notes back, in one line; empty if one can."""
    for name, x in notes.items():
        if not isinstance(name, str) or not NOTE_NAME.fullmatch(name):
            return f"a note's name is up to 32 letters a to z and underscores, not {name!r}"
        if x.dtype not in _NOTE_DTYPES or x.dim() > 4:
            return f"note {name!r} must have at most 4 dimensions of a dtype of chunks, not {x.dtype} {tuple(x.shape)}"
    return ""


@dataclass(frozen=True)
class Fetched:
    """A chunk and the lowest tier it was read from, or why there is none (`why` is copied into the receipt)."""

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
    """The shape of a model's chunks (`ChunkShape`)."""

    def misfit_of(self, chunk: ChunkKV, tokens: int | None = None) -> str:
        """Why `chunk` does not have this shape, or not `tokens` tokens; empty if it does."""
        ...


class ChunkStore(ABC):
    """Maps chunk keys to `ChunkKV`. A key identifies its content: storing it twice is harmless."""

    def __init__(self) -> None:
        self.stats = StoreStats()

    @abstractmethod
    def contains(self, key: ChunkKey) -> bool:
        """Whether `get` would find the chunk; changes nothing."""

    @abstractmethod
    def get(self, key: ChunkKey) -> ChunkKV | None:
        """The chunk, or None if it is not stored (any more)."""

    def fetch(self, key: ChunkKey, shape: "Fits | None" = None, tokens: int | None = None) -> Fetched:
        """As `get`, with the reason for a miss. A chunk of another shape or number of tokens is a miss."""
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
        """Store the chunk; StoreError if it can never fit."""

    def rescore(self, key: ChunkKey, scores: Tensor, of: ChunkKV | None = None) -> bool:
        """Replace the scores of a chunk in memory by `scores`, float32 [n], on the host; returns whether that was done.

        With `of`, the chunk as it was read, nothing is done if the key has other KV by now. Files and servers keep the
        scores that a chunk was written with. StoreError for invalid scores.
        """
        return False

    def replace(self, key: ChunkKey, chunk: ChunkKV) -> bool:
        """Store `chunk` in place of the one under its key; returns whether that was done.

        False if there is none under the key, and in stores that write a chunk only once.
        """
        return False

    @abstractmethod
    def __len__(self) -> int:
        """Number of stored chunks."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of stored chunks."""
