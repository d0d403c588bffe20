"""Ledger prompts in files: JSON lines, one task example each, the same bytes for the same arguments."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from cacheslide.errors import DataError
from harness.tasks.example import Question, TaskExample, TextSegment
from harness.tasks.jsonlines import read_lines, write_lines
from harness.tasks.ledger.prompts import examples


def write_rows(path: Path, style: str, split: str, seed: int, count: int, tokens: int) -> str:
    """Write `count` prompts and return the file's SHA-256. Leaves no half-written file."""
    return write_lines(path, map(asdict, examples(style, split, seed, count, tokens)))


def read_rows(path: Path) -> Iterator[TaskExample]:
    """Task examples from a file that `write_rows` wrote; DataError on any other line."""
    for where, row in read_lines(path):
        try:
            example = _example(row)
            json.dumps(asdict(example))
        except (LookupError, TypeError, ValueError, AttributeError):
            raise DataError(f"{where}: the line does not hold a ledger prompt") from None
        yield example


def _example(row: dict) -> TaskExample:
    told = {k: tuple(TextSegment(**s) for s in row[k]) for k in ("segments", "previous")}
    asked = tuple(Question(**{**q, "answers": tuple(q["answers"])}) for q in row["questions"])
    texts = (row["id"], row["task"], *(s.text for s in told["segments"]), *(q.text for q in asked))
    if not all(isinstance(t, str) for t in texts) or row["metric"] != "f1":
        raise TypeError("not a ledger prompt")
    return TaskExample(row["id"], row["task"], **told, questions=asked, meta=dict(row["meta"]))
