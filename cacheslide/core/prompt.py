"""The prompt model: ordered segments of token ids, each either fixed (reuse) or updated (recompute).

The paper's prompt template (section 2): a static system prompt, updated segments that change every turn, and
fixed segments whose order never changes while their position does. Separators are handled as token ids, so a
boundary can never be moved by the tokeniser merging text across it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import accumulate, chain

from cacheslide.errors import PromptError


class Role(StrEnum):
    """How a segment's KV is treated: reused (fixed text) or always recomputed (updated text)."""

    REUSE = "reuse"
    RECOMPUTE = "recompute"


@dataclass(frozen=True)
class Segment:
    """A run of token ids with one role."""

    token_ids: tuple[int, ...]
    role: Role
    name: str = ""

    def __post_init__(self) -> None:
        # One check over all ids at once: a server checks every token of every prompt.
        if not set(map(type, self.token_ids)) <= {int} or (self.token_ids and min(self.token_ids) < 0):
            raise PromptError(f"segment {self.name!r}: token ids must be integers >= 0")
        try:
            object.__setattr__(self, "role", Role(self.role))
        except ValueError:
            raise PromptError(
                f"segment {self.name!r}: role must be 'reuse' or 'recompute', not {self.role!r}"
            ) from None


@dataclass(frozen=True)
class Chunk:
    """A cacheable piece of a fixed segment: rows [start, end) of the prompt.

    `segment` is the index of its segment and `ordinal` its index among the prompt's chunks.
    """

    segment: int
    ordinal: int
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Prompt:
    """Ordered segments. Empty segments are dropped; a prompt without tokens is an error."""

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        kept = tuple(s for s in self.segments if s.token_ids)
        if not kept:
            raise PromptError("the prompt is empty")
        object.__setattr__(self, "segments", kept)

    def __getstate__(self) -> dict:
        """State for pickling between processes: every token id once, no cached properties."""
        return {"segments": self.segments}

    @classmethod
    def from_spans(cls, token_ids: Sequence[int], reuse: Iterable[tuple[int, int]]) -> "Prompt":
        """Mark the half-open spans `reuse` of `token_ids` as fixed; everything between them is updated."""
        spans = sorted((int(a), int(b)) for a, b in reuse)
        segments, at = [], 0
        for start, end in spans:
            if not 0 <= start < end <= len(token_ids):
                raise PromptError(f"span [{start}, {end}) is empty or outside the prompt of {len(token_ids)} tokens")
            if start < at:
                raise PromptError(f"span [{start}, {end}) overlaps the one before it, which ends at {at}")
            segments.append(Segment(tuple(token_ids[at:start]), Role.RECOMPUTE))
            segments.append(Segment(tuple(token_ids[start:end]), Role.REUSE))
            at = end
        segments.append(Segment(tuple(token_ids[at:]), Role.RECOMPUTE))
        return cls(tuple(segments))

    @cached_property
    def token_ids(self) -> tuple[int, ...]:
        """All token ids, in order."""
        return tuple(chain.from_iterable(s.token_ids for s in self.segments))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first row of each segment."""
        return tuple(accumulate((len(s.token_ids) for s in self.segments), initial=0))[:-1]

    def __len__(self) -> int:
        return len(self.token_ids)

    def chunks(self, chunk_size: int) -> tuple[Chunk, ...]:
        """The fixed segments cut into pieces of at most `chunk_size` tokens, each cut starting at its segment.

        Cutting from the segment's start keeps earlier chunks (and their keys) unchanged when a history grows.
        """
        if chunk_size < 1:
            raise PromptError(f"chunk_size must be at least 1, not {chunk_size}")
        out: list[Chunk] = []
        for i, (segment, start) in enumerate(zip(self.segments, self.starts, strict=True)):
            if segment.role is Role.REUSE:
                end = start + len(segment.token_ids)
                for at in range(start, end, chunk_size):
                    out.append(Chunk(i, len(out), at, min(at + chunk_size, end)))
        return tuple(out)

    def reusable_share(self) -> float:
        """The share of the prompt's tokens that lie in fixed segments (the paper's Fig. 3)."""
        return sum(len(s.token_ids) for s in self.segments if s.role is Role.REUSE) / len(self)
