"""Placement: the position indices of a prompt's rows, and the rotation of cached KV to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cacheslide.core.prompt import Prompt, Role
from cacheslide.core.tensors import send
from cacheslide.errors import PolicyError
from cacheslide.models.adapter import KVBuffer
from cacheslide.policies.deviation import deviation
from cacheslide.positions.rope import Rotary
from cacheslide.store.base import ChunkKV


@dataclass(frozen=True)
class Placement:
    """The third part of a policy.

    rotation "delta" turns cached keys to the positions of their rows; "stored" leaves them at the positions they
    were encoded at, as PIC systems without re-rotation do. With `slot` > 0 positions follow a schema in
    PromptCache's manner: every updated segment is given a multiple of `slot` positions, whatever its length, so
    that fixed segments keep their positions until an updated one outgrows its slot.
    """

    rotation: Literal["delta", "stored"] = "delta"
    slot: int = 0

    def __post_init__(self) -> None:
        if self.rotation not in ("delta", "stored"):
            raise PolicyError(f"rotation must be 'delta' or 'stored', not {self.rotation!r}")
        if self.slot < 0:
            raise PolicyError(f"slot must be at least 0 tokens, not {self.slot}")

    def positions(self, prompt: Prompt) -> Sequence[int]:
        """The position index of every row: a `range` where it is the row's own index."""
        if not self.slot:
            return range(len(prompt))
        out, at = [], 0
        for segment in prompt.segments:
            n = len(segment.token_ids)
            out.extend(range(at, at + n))
            at += n if segment.role is Role.REUSE else -(-n // self.slot) * self.slot
        return tuple(out)


@dataclass(frozen=True)
class Piece:
    """`length` rows of a cached chunk from its row `first` on, placed at consecutive rows of the prompt."""

    chunk: ChunkKV
    length: int
    first: int = 0

    @property
    def rows(self) -> slice:
        """The piece's rows in the chunk."""
        return slice(self.first, self.first + self.length)

    @property
    def scores(self) -> Tensor:
        """Remembered deviation of the piece's rows, float32 [length], on the host; NaN where there is none."""
        scores = self.chunk.scores
        return torch.full((self.length,), torch.nan) if scores is None else scores[self.rows]


class PlacedChunks:
    """A `KVSource` over cached chunks, in prompt order.

    Parameters
    ----------
    pieces : sequence of Piece
    target : Tensor [R], int64
        Position indices of the reused rows in this prompt; R is the sum of the pieces' lengths.
    rotaries : sequence of Rotary
        One per layer of the model.
    shift : int
        Offset of the whole prompt in positions; already added to `target`.
    device : torch.device, optional
        Device of the placed rows; `target` and the chunks' positions may stay on the host, where they are compared.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        target: Tensor,
        placement: Placement,
        rotaries: Sequence[Rotary],
        dtype: torch.dtype,
        shift: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.pieces, self.rotaries, self.dtype, self.device = pieces, rotaries, dtype, device or target.device
        self.deltas: Tensor | None = None  # positions by which each row's key turns; None when no key turns
        if placement.rotation == "delta":
            source = torch.cat([p.chunk.positions[p.rows] for p in pieces]).to(target.device)
            self.deltas = None if torch.equal(source, target) else send(target - source, self.device)
        elif shift:
            self.deltas = torch.full_like(target, shift, device=self.device)
        self._held: tuple[int, Tensor, Tensor] | None = None

    def layer(self, layer: int, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `KVSource.layer`."""
        if self._held is None or self._held[0] != layer:  # a layer is read up to three times: gather it once
            k = self._rows([p.chunk.k[layer] for p in self.pieces])
            v = self._rows([p.chunk.v[layer] for p in self.pieces])
            self._held = layer, k, v
        _, k, v = self._held
        deltas = self.deltas
        if index is not None and len(index) != len(k):
            k, v, deltas = k[index], v[index], None if deltas is None else deltas[index]
        return k if deltas is None else self.rotaries[layer].rotate(k, deltas), v

    def place(self, layer: int, index: Tensor, kv: KVBuffer, rows: Tensor) -> None:
        """See `KVSource.place`."""
        kv.write(layer, rows, *self.layer(layer, index))

    def deviation(self, layer: int, index: Tensor, k: Tensor, v: Tensor, metric: str) -> Tensor:
        """See `KVSource.deviation`."""
        pairs = zip("kv", (k, v), self.layer(layer, index), strict=True)
        return sum(deviation(fresh, cached) for name, fresh, cached in pairs if name in metric)

    def inputs(self, layer: int, index: Tensor) -> Tensor | None:
        """See `KVSource.inputs`."""
        if any(layer not in p.chunk.layer_inputs for p in self.pieces):
            return None
        return self._rows([p.chunk.layer_inputs[layer] for p in self.pieces])[index]

    def _rows(self, parts: list[Tensor]) -> Tensor:
        to = {"device": self.device, "dtype": self.dtype, "non_blocking": True}
        cut = [x[p.rows].to(**to) for x, p in zip(parts, self.pieces, strict=True)]
        return torch.cat(cut)
