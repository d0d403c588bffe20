"""Put the parts of a prompt together in the paper's order: system prompt, updated segment, fixed segments."""

from collections.abc import Iterable, Sequence

from cacheslide.errors import DataError
from harness.metrics.answers import normalize_answer
from harness.tasks.example import Question, TaskExample, TextSegment


def example(
    *,
    id: str,
    task: str,
    system: str,
    updated: tuple[str, str, str],
    fixed: Sequence[tuple[str, str]],
    question: Question,
    metric: str,
    meta: dict[str, str],
) -> TaskExample:
    """Build a `TaskExample` with one updated segment between the system prompt and the fixed segments.

    Parameters
    ----------
    updated : tuple of str
        Name of the updated segment, its text now, and its text in the turn before, which must differ.
    fixed : sequence of (str, str)
        Name and text of the fixed segments, in order. Every segment's text is made to end in one newline.
    """
    name, now, before = updated
    if now == before:
        raise DataError(f"example {id}: the updated segment {name!r} does not differ from the turn before")
    head = TextSegment("system", _line(system), "reuse")
    tail = tuple(TextSegment(part, _line(text), "reuse") for part, text in fixed)
    return TaskExample(
        id=id,
        task=task,
        segments=(head, TextSegment(name, _line(now), "recompute"), *tail),
        previous=(head, TextSegment(name, _line(before), "recompute"), *tail),
        questions=(question,),
        metric=metric,
        meta=meta,
    )


def mentions(text: str, phrases: Iterable[str]) -> bool:
    """Whether `text` holds one of `phrases` as a run of whole words, after HotPotQA's normalisation."""
    words = f" {normalize_answer(text)} "
    return any(f" {phrase} " in words for phrase in map(normalize_answer, phrases) if phrase)


def _line(text: str) -> str:
    return text.strip("\n") + "\n"
