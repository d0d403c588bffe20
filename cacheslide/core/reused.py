"""What a rule knows of a request's reused tokens before the request starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cacheslide.core.tensors import rows_of


@dataclass(frozen=True)
class ReusedTokens:
    """The runs of a prompt that have cached KV, in prompt order. R is the sum of `lengths`.

    Attributes
    ----------
    starts, lengths : tuple of int
        Of each run: its first local row, and its tokens. A run is (part of) one chunk.
    scores : Tensor [R], float32, on the host, optional
        Remembered deviation of each token's KV (`ChunkKV.scores`), NaN where nothing is remembered; None where
        nothing is remembered of any.
    token_ids : sequence of int, or Tensor, int64, on the host
        The ids of all local rows, reused or not, and of the prompt's text behind them; empty where a host does not say.
    notes : tuple of Mapping of str to Tensor
        Of each run: what is kept beside its chunk (`ChunkKV.notes`), whose tokens are counted from the run's first one;
        empty where nothing is kept beside any, or a run begins inside of its chunk.
    """

    starts: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    scores: Tensor | None = None
    token_ids: Sequence[int] | Tensor = ()
    notes: tuple[Mapping[str, Tensor], ...] = ()

    @classmethod
    def of(cls, *lengths: int, scores: Sequence[float] | None = None) -> "ReusedTokens":
        """Runs of these lengths, one behind the other from row 0."""
        starts = tuple(sum(lengths[:i]) for i in range(len(lengths)))
        return cls(starts, lengths, None if scores is None else torch.tensor(scores, dtype=torch.float32))

    @property
    def count(self) -> int:
        """R."""
        return sum(self.lengths)

    @property
    def rows(self) -> Tensor:
        """The local rows, int64 [R], on the host."""
        return rows_of((start, start + n) for start, n in zip(self.starts, self.lengths, strict=True))

    @property
    def behind_updates(self) -> tuple[bool, ...]:
        """Of each run: whether a token that is not reused stands right in front of it."""
        ends = (0, *(start + n for start, n in zip(self.starts, self.lengths, strict=True)))
        return tuple(start > end for start, end in zip(self.starts, ends, strict=False))

    @property
    def remembered(self) -> Tensor:
        """Scores, float32 [R], on the host: NaN for every token where nothing is remembered of any."""
        return torch.full((self.count,), torch.nan) if self.scores is None else self.scores

    @property
    def stretches(self) -> tuple[range, ...]:
        """Reused text behind each update: indices, into the R tokens, from one update up to the next.

        However many chunks such text is cut into, it is one stretch. What stands in front of every update is in none.
        """
        out: list[range] = []
        at = 0
        for length, behind in zip(self.lengths, self.behind_updates, strict=True):
            if behind:
                out.append(range(at, at + length))
            elif out:
                out[-1] = range(out[-1].start, at + length)
            at += length
        return tuple(out)
