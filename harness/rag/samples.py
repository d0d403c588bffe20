"""Samples of the pipeline: a question, its answers and the passages to choose from, read from a data file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cacheslide.errors import DataError
from harness.tasks import hub, samsum
from harness.tasks.passages import PassageRow, answer_passages, file_hash, read_passages, row_hash

TABLES = (".csv", ".parquet")


@dataclass(frozen=True)
class SampleFile:
    """The samples of one file.

    Attributes
    ----------
    path : Path
    name : str
        The file's stem, part of the names of all results.
    sha256 : str
        Hash of the file.
    rows : tuple of PassageRow
    metric : str
        Key of `harness.scoring.score` that scores an answer: "rouge_l" for summaries, else "f1".
    """

    path: Path
    name: str
    sha256: str
    rows: tuple[PassageRow, ...]
    metric: str

    def about(self) -> dict[str, str]:
        """Name, path and hash, for records."""
        return {"name": self.name, "path": str(self.path), "sha256": self.sha256}


def read_samples(path: str | Path, count: int | None = None) -> SampleFile:
    """The first `count` samples of a file (None: all); DataError in one line for a file that holds none or fewer.

    The schemas of `harness.tasks.passages.read_passages`, and SAMSum's.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file (--data names a file of questions with passages; docs/rag.md)")
    rows = samsum_rows(path) if _is_samsum(path) else read_passages(path)
    if count is not None and len(rows) < count:
        raise DataError(f"{path}: {count} samples are asked for, the file holds {len(rows)}")
    summaries = rows[0].dataset == samsum.TASK
    return SampleFile(path, path.stem, file_hash(path), tuple(rows[:count]), "rouge_l" if summaries else "f1")


def needed_passages(row: PassageRow) -> tuple[tuple[int, ...], str]:
    """Indices of the passages that a retriever should find, and who says so.

    "gold": the set marks them. "answer": those that hold an answer, where it does not. "" without either.
    """
    if row.gold:
        return row.gold, "gold"
    if row.dataset == samsum.TASK:  # a summary is not quoted from an example
        return (), ""
    holding = answer_passages(row)
    return holding, "answer" if holding else ""


def samsum_rows(path: Path) -> list[PassageRow]:
    """SAMSum: the question is a dialogue, the passages are solved dialogues of the same file.

    The first rows, `samsum.POOL` of them or half of the file, are the solved ones and are not asked about.
    """
    rows = [row for row in hub.rows(samsum.SOURCE, "test", path) if row["dialogue"]]
    pool = min(samsum.POOL, len(rows) // 2)
    if not pool:
        raise DataError(f"{path}: two dialogues are needed, a solved one and one to summarise")
    solved = tuple(samsum.solved(row) for row in rows[:pool])
    return [_summary_row(row, solved) for row in rows[pool:]]


def _summary_row(row: hub.Row, solved: Sequence[str]) -> PassageRow:
    question = samsum.to_summarise(row) + "\nSummary:"
    answers = (row["summary"].strip(),)
    return PassageRow(row["id"], row_hash(row.fields), samsum.TASK, question, answers, tuple(solved), ())


def _is_samsum(path: Path) -> bool:
    if path.suffix in TABLES:
        return True
    first = next(hub.json_rows(path), None)
    return first is not None and isinstance(first[1], dict) and "dialogue" in first[1]
