"""LongBench's files (Bai et al., 2024): one JSON line per row, all passages in one text, headed "Passage N:"."""

import re

from datasets import Features, List, Value

from cacheslide.errors import DataError
from harness.tasks.schema import Schema

SCHEMA = Schema(
    Features(
        {
            "input": Value("string"),
            "context": Value("string"),
            "answers": List(Value("string")),
            "length": Value("int32"),
            "dataset": Value("string"),
            "language": Value("string"),
            "all_classes": List(Value("string")),
            "_id": Value("string"),
        }
    ),
    nullable=frozenset({"all_classes"}),
)
HEAD = re.compile(r"^Passage (\d+):[ \t]*\n?", re.MULTILINE)


def passages(context: str, where: str) -> tuple[str, ...]:
    """The passages of a context, in order, without their heads; DataError when there is no head.

    A head counts only with the next number in sequence, so that a passage may quote a head.
    """
    starts: list[re.Match[str]] = []
    for head in HEAD.finditer(context):
        if int(head[1]) == len(starts) + 1:
            starts.append(head)
    if not starts:
        raise DataError(f"{where}: field 'context' has no line 'Passage 1:' (a set without passages?)")
    ends = [head.start() for head in starts[1:]] + [len(context)]
    return tuple(context[head.end() : end].strip() for head, end in zip(starts, ends, strict=True))
