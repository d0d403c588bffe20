"""New scores for chunks from recomputed tokens: their fresh KV against the chunk's stored KV."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from cacheslide.core.keys import ChunkKey
from cacheslide.core.plan import Plan
from cacheslide.core.remembering import TokenKV, remembered_deviation
from cacheslide.core.request_builder import Found
from cacheslide.core.tensors import tensor_of
from cacheslide.models.adapter import KVBuffer, ModelAdapter
from cacheslide.store.base import ChunkKV


@dataclass(frozen=True)
class Refreshed:
    """A chunk with recomputed tokens.

    Attributes
    ----------
    start : int
        First row of the request that the chunk was reused for.
    chunk : ChunkKV
        The chunk as it was reused.
    scores : Tensor [n], float32, on the host
        Its scores, with those of the recomputed tokens replaced.
    mean : float
        Mean of the replaced scores.
    tokens : int
        Number of replaced scores, at least 1.
    """

    start: int
    chunk: ChunkKV
    scores: Tensor
    mean: float
    tokens: int


def refreshed(
    model: ModelAdapter, cached: Found, selected: Tensor, kv: KVBuffer, positions: Sequence[int]
) -> Iterator[Refreshed]:
    """New scores of the chunks that a request reused, in prompt order, computed lazily.

    The formula is `remembered_deviation` with the request as the prompt and the chunk as the reference; its keys turn
    to the tokens' positions under any placement. Chunks without scores are left out, since their other tokens have
    none, and so are chunks with a new score that is not finite.

    Parameters
    ----------
    cached : Found
        The reused rows; row 0 is row 0 of `kv`.
    selected : Tensor [S], int64
        Rows that were recomputed, ascending (`PrefillOutput.selected`).
    kv : KVBuffer
        KV of the completed request. Only recomputed rows are read.
    positions : sequence of int
        Positions of all rows of `kv`.
    """
    selected, where = selected.cpu(), tensor_of(positions)
    for piece, span in zip(cached.pieces, cached.spans, strict=True):
        rows = selected[(selected >= span.start) & (selected < span.stop)]
        old = piece.chunk.scores
        if old is None or not len(rows):
            continue
        at, of = rows.to(model.device), rows - span.start + piece.first
        recomputed = TokenKV(lambda layer, at=at: kv.read(layer, at), where[rows])
        new = remembered_deviation(model, recomputed, TokenKV.of_chunk(piece.chunk, model.device), of)
        if bool(new.isfinite().all()):
            scores = old.clone()
            scores[of] = new
            yield Refreshed(span.start, piece.chunk, scores, float(new.mean()), len(of))


def unscored(cached: Found | None, plan: Plan) -> dict[ChunkKey, ChunkKV]:
    """Exact chunks without scores among those reused for a request; `plan` is the request's plan."""
    keys = {c.start: key for key, c in plan.keyed}
    reused = () if cached is None else zip(cached.pieces, cached.spans, strict=True)
    lacking = ((span.start, p.chunk) for p, span in reused if p.chunk.scores is None and not p.chunk.generation)
    return {keys[start]: chunk for start, chunk in lacking}
