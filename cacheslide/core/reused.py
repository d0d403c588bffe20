"""A request's reused tokens, as a correction sees them before the request starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cacheslide.core.tensors import rows_of


@dataclass(frozen=True)
class ReusedTokens:
    """The runs of a prompt with cached KV, in prompt order. R is the sum of `lengths`.

    Attributes
    ----------
    starts, lengths : tuple of int
        First local row and number of tokens of each run. A run is (part of) one chunk.
    scores : Tensor [R], float32, on the host, optional
        Remembered deviation of each token's KV (`ChunkKV.scores`), NaN where there is none; None where no token has
        one.
    token_ids : sequence of int, or Tensor, int64, on the host
        Ids of all local rows and of the prompt's text behind them; empty where the host does not give them.
    before : int
        Rows of the prompt that were complete before the request: local row 0 is the prompt's row `before`.
    notes : tuple of Mapping of str to Tensor
        Per run: the notes of its chunk (`ChunkKV.notes`), with tokens counted from the run's first one; empty where no
        chunk has notes, or where a run begins inside its chunk.
    """

    starts: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    scores: Tensor | None = None
    token_ids: Sequence[int] | Tensor = ()
    before: int = 0
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
        """For each run, whether the token right before it is not reused."""
        ends = (0, *(start + n for start, n in zip(self.starts, self.lengths, strict=True)))
        return tuple(start > end for start, end in zip(self.starts, ends, strict=False))

    @property
    def remembered(self) -> Tensor:
        """Scores, float32 [R], on the host; NaN for tokens without one."""
        return torch.full((self.count,), torch.nan) if self.scores is None else self.scores

    @property
    def stretches(self) -> tuple[range, ...]:
        """Stretches of reused text, each from one update up to the next: ranges of indices into the R tokens.

        A stretch may span several chunks. Text before the first update is in no stretch.
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
