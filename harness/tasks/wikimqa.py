"""2WikiMultihopQA (Ho et al., 2020): ten paragraphs, and the chain of Wikidata triples behind the answer.

The hub's files store `context`, `supporting_facts` and `evidences` as JSON text; the original release has them as
lists of records; converted copies have columns. All three are accepted and brought into the columns declared here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Features, List, Value

from harness.tasks import hub, multihop
from harness.tasks.example import TaskExample
from harness.tasks.jsontext import parse
from harness.tasks.schema import Schema

TASK = "2wikimqa"
CHAINS = ("compositional", "inference")  # types whose evidences form one chain; the others compare two entities
FEATURES = Features(
    {
        "_id": Value("string"),
        "type": Value("string"),
        "question": Value("string"),
        "context": {"title": List(Value("string")), "sentences": List(List(Value("string")))},
        "supporting_facts": {"title": List(Value("string")), "sent_id": List(Value("int32"))},
        "evidences": {
            "fact": List(Value("string")),
            "relation": List(Value("string")),
            "entity": List(Value("string")),
        },
        "answer": Value("string"),
    }
)
RECORDS = {name: tuple(FEATURES[name]) for name in ("context", "supporting_facts", "evidences")}


def adapt(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Decode JSON text and turn records into columns."""
    row = dict(row)
    if "_id" not in row and "id" in row:
        row["_id"] = row["id"]
    for name, parts in RECORDS.items():
        if name in row:
            row[name] = multihop.columns(_decoded(row[name], name, where), parts)
    context = row.get("context")
    if isinstance(context, dict) and "sentences" not in context and "content" in context:
        row["context"] = {**context, "sentences": context["content"]}
    return row


def _decoded(value: Any, name: str, where: str) -> Any:
    return parse(value, f"{where}: field {name!r} holds text that is") if isinstance(value, str) else value


SOURCE = hub.Source(
    name=TASK,
    repo="xanhho/2WikiMultihopQA",
    files={"train": "train.parquet", "validation": "dev.parquet"},
    schema=Schema(FEATURES),
    adapt=adapt,
)


def load(split: str, path: str | Path | None = None, limit: int | None = None, seed: int = 0) -> Iterator[TaskExample]:
    """2WikiMultihopQA as Reflexion sees it; the public test split has no answers and is not offered.

    `depth` is the length of the evidence chain, None for comparisons. See `registry.load` for the parameters.
    """
    return hub.limited((_example(row, split, seed) for row in hub.rows(SOURCE, split, path)), limit)


def _example(row: hub.Row, split: str, seed: int) -> TaskExample:
    context = row["context"]
    return multihop.qa_example(
        task=TASK,
        row=row,
        row_id=row["_id"],
        rng=hub.row_rng(seed, TASK, row["_id"]),
        paragraphs=multihop.joined(context["title"], context["sentences"], row.where),
        answers=[row["answer"]],
        depth=(len(row["evidences"]["fact"]) or None) if row["type"] in CHAINS else None,
        meta={"split": split, "type": row["type"]},
    )
