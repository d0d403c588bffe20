"""Per-request records as JSON lines, written so that an interrupted run resumes and failures stay apart.

While a run is under way its records sit in `<output>.part.jsonl`; `finish` renames it into place. The first line is a
header with the run's settings: a part whose header differs belongs to another run and is started over.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cacheslide.errors import CacheSlideError, DataError

SCHEMA = "cacheslide.records/1"


class RecordWriter:
    """Appends records to `output`, skipping those a previous, interrupted run already made.

    Parameters
    ----------
    output : Path
        Final place of the records.
    settings : dict
        Everything the records depend on; JSON-serialisable.
    """

    def __init__(self, output: str | Path, settings: dict[str, Any]) -> None:
        self.output = Path(output)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.part = self.output.with_name(f".{self.output.name}.part")
        header = {"schema": SCHEMA, "settings": settings}
        self.done: set[str] = set()
        if self.part.is_file():
            kept = _whole_lines(self.part)
            if kept and kept[0] == json.loads(json.dumps(header)):
                self.done = {r["id"] for r in kept[1:]}
                self._rewrite(kept)
            else:
                self.part.unlink()
        if not self.part.is_file():
            self._rewrite([header])
        self._file = self.part.open("a", encoding="utf-8")

    def _rewrite(self, lines: list[dict]) -> None:
        self.part.write_text("".join(json.dumps(r, sort_keys=True) + "\n" for r in lines), encoding="utf-8")

    def add(self, record: dict[str, Any]) -> None:
        """Append one record; its "id" must be unique in the file."""
        try:
            self._file.write(json.dumps(record, sort_keys=True) + "\n")
            self._file.flush()
        except OSError as full:
            raise DataError(f"cannot write {self.output}: {full}; finished records stay in {self.part.name}") from None
        self.done.add(record["id"])

    def fail(self, record_id: str, error: Exception) -> None:
        """Record a failed request, apart from the results."""
        self.add({"id": record_id, "failure": f"{type(error).__name__}: {error}"})

    def finish(self) -> None:
        """Put the file in place."""
        self._file.close()
        os.replace(self.part, self.output)


def _whole_lines(path: Path) -> list[dict]:
    """Parsed lines up to the first torn one (a killed run may leave half a line)."""
    out = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return out


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a record file's header."""
    with Path(path).open(encoding="utf-8") as f:
        header = json.loads(f.readline())
    if header.get("schema") != SCHEMA:
        raise DataError(f"{path}: schema {header.get('schema')!r}, expected {SCHEMA!r}")
    return header["settings"]


def read_records(path: str | Path) -> Iterator[dict[str, Any]]:
    """The successful records of a file."""
    read_settings(path)
    with Path(path).open(encoding="utf-8") as f:
        next(f)
        for line in f:
            record = json.loads(line)
            if "failure" not in record:
                yield record


def read_failures(path: str | Path) -> list[dict[str, Any]]:
    """The failed requests of a file."""
    read_settings(path)
    with Path(path).open(encoding="utf-8") as f:
        next(f)
        return [r for r in map(json.loads, f) if "failure" in r]


def guarded(writer: RecordWriter, record_id: str, work, keep: bool = True) -> None:
    """Run `work()` and keep its record; an expected error becomes a failure record, others stop the run.

    Without `keep` the record is dropped: more is to join it before it is written.
    """
    if record_id in writer.done:
        return
    try:
        record = work()
    except CacheSlideError as error:
        writer.fail(record_id, error)
    else:
        if keep:
            writer.add({"id": record_id, **record})


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON under a temporary name and rename it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as full:
        part.unlink(missing_ok=True)
        raise DataError(f"cannot write {path}: {full}") from None
