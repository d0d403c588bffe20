"""Where the rows of a prompt sit, and how cached KV is moved to where its rows sit now."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cacheslide.errors import PolicyError
from cacheslide.positions.rope import Rotary
from cacheslide.prompt import Prompt, Role
from cacheslide.store.base import ChunkKV


@dataclass(frozen=True)
class Placement:
    """The third choice of a policy.

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

    def positions(self, prompt: Prompt) -> list[int]:
        """The position index of every row."""
        if not self.slot:
            return list(range(len(prompt)))
        out, at = [], 0
        for segment in prompt.segments:
            n = len(segment.token_ids)
            out.extend(range(at, at + n))
            at += n if segment.role is Role.REUSE else -(-n // self.slot) * self.slot
        return out


@dataclass(frozen=True)
class Piece:
    """The first `length` rows of a cached chunk, to be placed at consecutive rows."""

    chunk: ChunkKV
    length: int


class PlacedChunks:
    """A `KVSource` over cached chunks, in prompt order.

    Parameters
    ----------
    pieces : sequence of Piece
    target : Tensor [R], int64
        Position indices of the reused rows in this prompt; R is the sum of the pieces' lengths.
    """

    def __init__(
        self, pieces: Sequence[Piece], target: Tensor, placement: Placement, rotary: Rotary, dtype: torch.dtype
    ) -> None:
        self.pieces, self.target, self.rotary, self.dtype = pieces, target, rotary, dtype
        self.source = torch.cat([p.chunk.positions[: p.length] for p in pieces]).to(target.device)
        self.moves = placement.rotation == "delta" and not torch.equal(self.source, target)
        self._held: tuple[int, Tensor, Tensor] | None = None

    def layer(self, layer: int, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `KVSource.layer`."""
        if self._held is None or self._held[0] != layer:  # a layer is read up to three times: place it once
            k = self._rows([p.chunk.k[layer] for p in self.pieces])
            v = self._rows([p.chunk.v[layer] for p in self.pieces])
            self._held = layer, self.rotary.move(k, self.source, self.target) if self.moves else k, v
        _, k, v = self._held
        return (k, v) if index is None or len(index) == len(k) else (k[index], v[index])

    def inputs(self, layer: int, index: Tensor) -> Tensor | None:
        """See `KVSource.inputs`."""
        if any(layer not in p.chunk.layer_inputs for p in self.pieces):
            return None
        return self._rows([p.chunk.layer_inputs[layer] for p in self.pieces])[index]

    def _rows(self, parts: list[Tensor]) -> Tensor:
        cut = [x[: p.length] for x, p in zip(parts, self.pieces, strict=True)]
        return torch.cat(cut).to(device=self.target.device, dtype=self.dtype)
