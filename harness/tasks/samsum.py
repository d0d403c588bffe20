"""SAMSum (Gliwa et al., 2019): chat dialogues with summaries; a few solved ones are the fixed segments.

The dialogue to summarise stands before the solved examples and changes from turn to turn, so the examples move.
They are drawn once, by the seed, from the first rows of the split, and are never asked about.
"""

import random
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from datasets import Features, Value

from cacheslide.errors import DataError
from harness.tasks import hub, layout
from harness.tasks.example import Question, TaskExample
from harness.tasks.schema import Schema

TASK = "samsum"
SHOTS = 4  # solved dialogues in every prompt
POOL = 64  # rows they are drawn from
SYSTEM = (
    "You summarise chat dialogues in one or two sentences, in the third person. "
    "First comes the dialogue to summarise, then dialogues with good summaries as examples."
)
FEATURES = Features({name: Value("string") for name in ("id", "dialogue", "summary")})
SOURCE = hub.Source(
    name=TASK,
    repo="knkarthick/samsum",
    files={split: f"{split}.csv" for split in ("train", "validation", "test")},
    # one training row has an empty dialogue, which a csv file cannot tell from null
    schema=Schema(FEATURES, nullable=frozenset({"dialogue"})),
)


def load(split: str, path: str | Path | None = None, limit: int | None = None, seed: int = 0) -> Iterator[TaskExample]:
    """SAMSum with few-shot examples; rows without a dialogue, or with the previous row's dialogue, are left out.

    See `registry.load` for the parameters."""
    return hub.limited(_examples(hub.rows(SOURCE, split, path), split, seed), limit)


def _examples(rows: Iterator[hub.Row], split: str, seed: int) -> Iterator[TaskExample]:
    rows = (row for row in rows if row["dialogue"])
    pool = list(islice(rows, POOL))
    if len(pool) < SHOTS + 2:
        raise DataError(f"{TASK}: {SHOTS} examples and two dialogues to ask about are needed, found {len(pool)} rows")
    chosen = random.Random(f"{seed}/{TASK}").sample(range(len(pool)), SHOTS)
    shots = [(f"example_{i}", solved(pool[j])) for i, j in enumerate(chosen)]
    asked = (row for i, row in enumerate(pool) if i not in chosen)
    # each dialogue follows the one before it in the file; the first one follows the second
    before, *rest = islice(asked, 2)
    yield _example(before, rest[0], shots, split)
    for row in chain(rest, asked, rows):
        if row["dialogue"] != before["dialogue"]:  # a turn must change the updated segment
            yield _example(row, before, shots, split)
            before = row


def _example(row: hub.Row, before: hub.Row, shots: list[tuple[str, str]], split: str) -> TaskExample:
    return layout.example(
        id=row["id"],
        task=TASK,
        system=SYSTEM,
        updated=("dialogue", to_summarise(row), to_summarise(before)),
        fixed=shots,
        question=Question(
            id=row["id"],
            text="Summary of the dialogue that stands before the examples:",
            answers=(row["summary"].strip(),),
            volatile=True,
        ),
        metric="rouge_l",
        meta={"file": row.file, "split": split},
    )


def to_summarise(row: hub.Row) -> str:
    """A row's dialogue as the prompt's task."""
    return "Dialogue to summarise:\n" + _lines(row)


def solved(row: hub.Row) -> str:
    """A row's dialogue with its summary, as an example."""
    return f"Dialogue:\n{_lines(row)}\nSummary: {row['summary'].strip()}"


def _lines(row: hub.Row) -> str:
    return "\n".join(line.strip() for line in row["dialogue"].splitlines() if line.strip())
