"""MuSiQue-Answerable (Trivedi et al., 2022): twenty paragraphs, two to four single-hop questions chained into one."""

from collections.abc import Iterator
from pathlib import Path

from datasets import Features, List, Value

from harness.tasks import hub, multihop
from harness.tasks.example import TaskExample
from harness.tasks.schema import Schema

TASK = "musique"
FEATURES = Features(
    {
        "id": Value("string"),
        "paragraphs": List(
            {
                "idx": Value("int32"),
                "title": Value("string"),
                "paragraph_text": Value("string"),
                "is_supporting": Value("bool"),
            }
        ),
        "question": Value("string"),
        "question_decomposition": List(
            {
                "id": Value("int32"),
                "question": Value("string"),
                "answer": Value("string"),
            }
        ),
        "answer": Value("string"),
        "answer_aliases": List(Value("string")),
        "answerable": Value("bool"),
    }
)
SOURCE = hub.Source(
    name=TASK,
    repo="dgslibisey/MuSiQue",
    files={"train": "musique_ans_v1.0_train.jsonl", "validation": "musique_ans_v1.0_dev.jsonl"},
    schema=Schema(FEATURES),
)


def load(split: str, path: str | Path | None = None, limit: int | None = None, seed: int = 0) -> Iterator[TaskExample]:
    """MuSiQue as Reflexion sees it; rows marked unanswerable (MuSiQue-Full has them) are left out.

    `depth` is the number of steps in the decomposition. See `registry.load` for the parameters.
    """
    rows = hub.rows(SOURCE, split, path)
    return hub.limited((_example(row, split, seed) for row in rows if row["answerable"]), limit)


def _example(row: hub.Row, split: str, seed: int) -> TaskExample:
    ordered = sorted(row["paragraphs"], key=lambda paragraph: paragraph["idx"])
    return multihop.qa_example(
        task=TASK,
        row=row,
        row_id=row["id"],
        rng=hub.row_rng(seed, TASK, row["id"]),
        paragraphs=[(p["title"], p["paragraph_text"]) for p in ordered],
        answers=[row["answer"], *row["answer_aliases"]],
        depth=len(row["question_decomposition"]) or None,
        meta={"split": split},
    )
