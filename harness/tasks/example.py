"""Output of the task loaders: a prompt as ordered text segments, with its questions.

A prompt follows the paper's template (section 2): a static system prompt, updated segments that change from
turn to turn, and fixed segments (documents, files, history) that keep their order. `previous` is the turn
before, with the same fixed segments and other updated ones: the prompt that fills the cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from cacheslide.errors import DataError

SegmentRole = Literal["reuse", "recompute"]


@dataclass(frozen=True)
class TextSegment:
    """One segment of a prompt, before tokenisation. `role` is "reuse" for fixed text, "recompute" for updated."""

    name: str
    text: str
    role: SegmentRole

    def __post_init__(self) -> None:
        if self.role not in ("reuse", "recompute"):
            raise DataError(f"segment {self.name!r}: role must be 'reuse' or 'recompute', not {self.role!r}")


@dataclass(frozen=True)
class Question:
    """A question about a prompt.

    `text` is appended after the last segment and always recomputed; `answers` are the accepted gold answers;
    `depth` is the number of hops from the asked name to its value (None where unknown); `volatile` is
    whether the answer depends on an updated segment (None where unknown).
    """

    id: str
    text: str
    answers: tuple[str, ...]
    depth: int | None = None
    volatile: bool | None = None


@dataclass(frozen=True)
class TaskExample:
    """A prompt, the turn before it, and its questions."""

    id: str
    task: str
    segments: tuple[TextSegment, ...]
    previous: tuple[TextSegment, ...]
    questions: tuple[Question, ...]
    metric: Literal["f1", "rouge_l", "success"] = "f1"
    meta: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.segments:
            raise DataError(f"example {self.id}: no segments")
        if not self.questions:
            raise DataError(f"example {self.id}: no questions")
        if fixed(self.segments) != fixed(self.previous):
            raise DataError(f"example {self.id}: the previous turn must hold the same fixed segments in the same order")


def fixed(segments: tuple[TextSegment, ...]) -> list[TextSegment]:
    """The reuse segments, in order."""
    return [s for s in segments if s.role == "reuse"]


def take(examples: Iterator[TaskExample], n: int | None) -> list[TaskExample]:
    """The first `n` examples (all when None); an error when there are fewer than asked for."""
    out = []
    for example in examples:
        if n is not None and len(out) == n:
            break
        out.append(example)
    if n is not None and len(out) < n:
        raise DataError(f"asked for {n} examples, the data holds {len(out)}")
    return out
