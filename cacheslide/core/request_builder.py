"""Builds a prompt's prefill request from its cached chunks; both hosts use it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cacheslide.core.keys import ChunkKey
from cacheslide.core.placement import Piece, PlacedChunks, Placement
from cacheslide.core.prefill_request import KVSource, PrefillRequest
from cacheslide.core.prompt import Chunk
from cacheslide.core.receipt import Receipt
from cacheslide.core.reused import ReusedTokens
from cacheslide.core.tensors import rows_of, send_together, tensor_of
from cacheslide.models.adapter import KVBuffer, ModelAdapter
from cacheslide.policies.base import Correction
from cacheslide.policies.none import NoCorrection
from cacheslide.positions.ccpe import PromptSlots
from cacheslide.store.base import ChunkKV

Fetch = Callable[[int, ChunkKey, Chunk], ChunkKV | None]


@dataclass
class Found:
    """Cached rows of one request, in prompt order: pieces of chunks, and the local rows that each fills."""

    pieces: list[Piece] = field(default_factory=list)
    spans: list[range] = field(default_factory=list)

    @classmethod
    def of(cls, request: PrefillRequest) -> "Found":
        """The cached rows of a request built by `RequestBuilder`."""
        spans = [range(a, a + n) for a, n in zip(request.runs.starts, request.runs.lengths, strict=True)]
        return cls(list(request.source.pieces) if spans else [], spans)

    @property
    def runs(self) -> ReusedTokens:
        """The rows of the pieces, and their tokens' remembered scores."""
        scores = None
        if any(p.chunk.scores is not None for p in self.pieces):
            scores = torch.cat([p.scores for p in self.pieces])
        notes: tuple = ()
        if any(p.chunk.notes for p in self.pieces):
            notes = tuple({} if p.first else p.chunk.notes for p in self.pieces)
        starts, lengths = tuple(s.start for s in self.spans), tuple(p.length for p in self.pieces)
        return ReusedTokens(starts, lengths, scores, notes=notes)

    def scores_of(self, start: int, end: int) -> Tensor | None:
        """Scores of rows [start, end), float32 [end - start]; None where one of them has none."""
        out = torch.full((end - start,), torch.nan)
        for piece, span in zip(self.pieces, self.spans, strict=True):
            first, last = max(span.start, start), min(span.stop, end)
            if first < last:
                out[first - start : last - start] = piece.scores[first - span.start : last - span.start]
        return None if bool(out.isnan().any()) else out

    @property
    def rows(self) -> Tensor:
        """The local rows, int64 [sum of lengths], ascending, on the host."""
        return rows_of((s.start, s.stop) for s in self.spans)


def find_pieces(
    chunks: Iterable[tuple[ChunkKey, Chunk]], start: int, limit: int, fetch: Fetch, receipt: Receipt
) -> Found:
    """The cached rows in [start, limit) of a prompt; counts them in `receipt`.

    Parameters
    ----------
    chunks : iterable of (ChunkKey, Chunk)
    start : int
        The request's first row, row 0 of the local rows.
    fetch : callable
        (number, key, chunk) -> the chunk's KV, or None where it is not available. Called only for chunks with rows in
        [start, limit).
    """
    cached = Found()
    for number, (key, chunk) in enumerate(chunks):
        first, end = max(chunk.start, start), min(chunk.end, limit)
        kv = fetch(number, key, chunk) if first < end else None
        if kv is not None:
            receipt.hit(kv)
            cached.pieces.append(Piece(kv, end - first, first - chunk.start))
            cached.spans.append(range(first - start, end - start))
    return cached


class RequestBuilder:
    """Builds requests for one model. A host whose KV is not in plain tensors overrides `source`."""

    def __init__(self, model: ModelAdapter) -> None:
        self.model = model

    def build(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        kv: KVBuffer,
        *,
        found: Found | None = None,
        placement: Placement | None = None,
        correction: Correction | None = None,
        start: int = 0,
        shift: int = 0,
        slots: PromptSlots | None = None,
        behind: Sequence[int] = (),
    ) -> PrefillRequest:
        """A request that completes rows `start`, `start` + 1, ... of `kv`.

        Parameters
        ----------
        token_ids, positions : sequence of int
            Ids and positions of these rows alone; positions without `shift`.
        found : Found, optional
            The cached rows; without it every row is computed.
        placement, correction
            The policy's parts, for the cached rows.
        shift : int
            Offset of all rows in positions, to be added to `positions`.
        slots : PromptSlots, optional
            Slots of the whole prompt, for models with canonical slot offsets.
        behind : sequence of int
            Ids of the prompt's text behind these rows, which the host computes itself; for rules that read ids.
        """
        model = self.model
        found = Found() if found is None else found
        correction = NoCorrection() if correction is None else correction
        where, rows, source = tensor_of(positions) + shift, found.rows, None
        if slots is not None:
            model.describe(kv, slots)
        if found.pieces:
            if placement is None:
                placement = Placement()
            if not model.rotates:  # unrotated keys hold at any position
                placement, shift = Placement("stored"), 0
            source = self.source(found.pieces, where[rows], placement, shift, correction)
        ids = tensor_of(token_ids)
        runs = replace(found.runs, token_ids=torch.cat([ids, tensor_of(behind)]), before=start)
        ids, where, rows = send_together((ids, where, rows), model.device)
        return PrefillRequest(ids, where, kv, rows, source, correction, runs, start)

    def source(
        self, pieces: Sequence[Piece], target: Tensor, placement: Placement, shift: int, correction: Correction
    ) -> KVSource:
        """A source that places the pieces at positions `target` [R], on the host; `target` includes `shift`."""
        model = self.model
        return PlacedChunks(pieces, target, placement, model.rotaries, model.dtype, shift, model.device)
