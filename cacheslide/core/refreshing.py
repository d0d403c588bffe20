"""Scores made anew where tokens are recomputed anyway: their fresh KV against the KV that their chunk is kept with."""

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
    """A chunk some of whose reused tokens were recomputed.

    Attributes
    ----------
    start : int
        The request's first row that the chunk was reused for.
    chunk : ChunkKV
        As it was reused.
    scores : Tensor [n], float32, on the host
        Its scores, those of the recomputed tokens new.
    mean : float
        Mean of the new ones.
    tokens : int
        How many they are, at least 1.
    """

    start: int
    chunk: ChunkKV
    scores: Tensor
    mean: float
    tokens: int


def refreshed(
    model: ModelAdapter, found: Found, selected: Tensor, kv: KVBuffer, positions: Sequence[int]
) -> Iterator[Refreshed]:
    """New scores of the chunks that a request reused, in prompt order, computed when asked for.

    The formula is `remembered_deviation`, the request being the prompt and the chunk the reference, whose keys turn to
    the tokens' positions whatever the policy's placement. Chunks without scores are left out: those of their other
    tokens would not be known. So is a chunk where a new score is no number.

    Parameters
    ----------
    found : Found
        What the request reused; its row 0 is row 0 of `kv`.
    selected : Tensor [S], int64
        Rows that were recomputed, ascending (`PrefillOutput.selected`).
    kv : KVBuffer
        The completed request's. Only recomputed rows are read.
    positions : sequence of int
        Of all of its rows.
    """
    selected, where = selected.cpu(), tensor_of(positions)
    for piece, span in zip(found.pieces, found.spans, strict=True):
        rows = selected[(selected >= span.start) & (selected < span.stop)]
        old = piece.chunk.scores
        if old is None or not len(rows):
            continue
        at, of = rows.to(model.device), rows - span.start + piece.first
        here = TokenKV(lambda layer, at=at: kv.read(layer, at), where[rows])
        new = remembered_deviation(model, here, TokenKV.of_chunk(piece.chunk, model.device), of)
        if bool(new.isfinite().all()):
            scores = old.clone()
            scores[of] = new
            yield Refreshed(span.start, piece.chunk, scores, float(new.mean()), len(of))


def unscored(found: Found | None, plan: Plan) -> dict[ChunkKey, ChunkKV]:
    """Exact chunks without scores among those that a request, whose plan is `plan`, has reused."""
    keys = {c.start: key for key, c in plan.keyed}
    held = () if found is None else zip(found.pieces, found.spans, strict=True)
    lacking = ((span.start, p.chunk) for p, span in held if p.chunk.scores is None and not p.chunk.generation)
    return {keys[start]: chunk for start, chunk in lacking}
