"""Work on every sample of a file, recorded line by line beside the step's result, so that a cut run resumes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cacheslide.errors import DataError
from harness.rag.samples import SampleFile
from harness.results.provenance import provenance
from harness.results.records import guarded, read_file, reopened, write_json
from harness.tasks.passages import PassageRow

Record = dict[str, Any]


def lines_of(out: Path) -> Path:
    """The file of records beside the result `out`."""
    return out.with_suffix(".jsonl")


def per_sample(
    out: Path, settings: dict[str, Any], rows: Sequence[PassageRow], work: Callable[[PassageRow], Record], title: str
) -> tuple[list[Record], list[Record]]:
    """`work` of every row, in order: the records, and the failures, each with the row's id.

    Records of an earlier run with equal `settings` are kept; others are set aside.

    Raises
    ------
    DataError
        If every sample failed; it names the first reason.
    """
    writer = reopened(lines_of(out), settings)
    try:
        for row in tqdm(rows, desc=title, mininterval=1):
            guarded(writer, row.id, lambda row=row: work(row))
        writer.finish()
    finally:
        writer.close()
    done = read_file(lines_of(out))
    if not done.records:
        why = f" ({done.failures[0]['failure']})" if done.failures else ""
        raise DataError(f"{title}: no sample succeeded{why}")
    order = {row.id: at for at, row in enumerate(rows)}
    return sorted(done.records, key=lambda record: order[record["id"]]), done.failures


def measured(
    out: Path,
    settings: dict[str, Any],
    samples: SampleFile,
    work: Callable[[PassageRow], Record],
    title: str,
    summary: Callable[[list[Record]], Any],
    **also: Any,
) -> dict[str, Any]:
    """`work` of every sample; writes settings, `also`, records, failures, their `summary` and provenance to `out`."""
    records, failures = per_sample(out, settings, samples.rows, work, title)
    result = (
        settings
        | also
        | {
            "samples": records,
            "failures": failures,
            "summary": summary(records),
            "provenance": provenance(settings, {samples.name: samples.sha256}, settings.get("model_id", "")),
        }
    )
    write_json(out, result)
    return result
