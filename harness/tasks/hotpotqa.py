"""HotPotQA, distractor setting (Yang et al., 2018): ten paragraphs, two of them needed for the answer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Features, List, Value

from harness.tasks import hub, multihop
from harness.tasks.example import TaskExample
from harness.tasks.schema import Schema

TASK = "hotpotqa"
FEATURES = Features(
    {
        "id": Value("string"),
        "question": Value("string"),
        "answer": Value("string"),
        "type": Value("string"),
        "level": Value("string"),
        "supporting_facts": {"title": List(Value("string")), "sent_id": List(Value("int32"))},
        "context": {"title": List(Value("string")), "sentences": List(List(Value("string")))},
    }
)


def adapt(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Accept the original release (`_id`, and [title, sentences] pairs) beside the hub's layout."""
    row = dict(row)
    if "id" not in row and "_id" in row:
        row["id"] = row["_id"]
    if "context" in row:
        row["context"] = multihop.columns(row["context"], ("title", "sentences"))
    if "supporting_facts" in row:
        row["supporting_facts"] = multihop.columns(row["supporting_facts"], ("title", "sent_id"))
    return row


SOURCE = hub.Source(
    name=TASK,
    repo="hotpotqa/hotpot_qa",
    files={"train": "distractor/train-*.parquet", "validation": "distractor/validation-*.parquet"},
    schema=Schema(FEATURES),
    adapt=adapt,
)


def load(split: str, path: str | Path | None = None, limit: int | None = None, seed: int = 0) -> Iterator[TaskExample]:
    """HotPotQA as Reflexion sees it; `seed` chooses the scratchpads. See `registry.load` for the parameters."""
    return hub.limited((_example(row, split, seed) for row in hub.rows(SOURCE, split, path)), limit)


def _example(row: hub.Row, split: str, seed: int) -> TaskExample:
    context = row["context"]
    return multihop.qa_example(
        task=TASK,
        row=row,
        row_id=row["id"],
        rng=hub.row_rng(seed, TASK, row["id"]),
        paragraphs=multihop.joined(context["title"], context["sentences"], row.where),
        answers=[row["answer"]],
        depth=None,
        meta={"split": split, "type": row["type"], "level": row["level"]},
    )
