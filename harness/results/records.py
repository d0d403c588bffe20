"""Per-request records as JSON lines, written so that an interrupted run resumes and failures stay apart.

While a run is under way its records sit in `.<output>.part`; `finish` renames it into place. The first line is a
header with the run's settings: a part whose header differs belongs to another run and is set aside. Lines carry
checksums (`harness.results.lines`); what a kill or a damaged byte leaves bad is named, left out and measured again.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cacheslide.errors import CacheSlideError, DataError
from harness.results.lines import LineFile, Lines, read_lines, set_aside

SCHEMA = "cacheslide.records/1"


class RecordWriter:
    """Appends records to `output`, skipping those a previous, interrupted run already made.

    Parameters
    ----------
    output : Path
        Final place of the records.
    settings : dict
        Everything the records depend on; JSON-serialisable.

    Raises
    ------
    DataError
        When another process writes these records, or they cannot be written. Finished records are never lost.
    """

    def __init__(self, output: str | Path, settings: dict[str, Any]) -> None:
        self.output = Path(output)
        self.part = self.output.with_name(f".{self.output.name}.part")
        self._header = header = json.loads(json.dumps({"schema": SCHEMA, "settings": settings}))
        self._file = LineFile(self.part)
        try:
            if not self._belongs(header):
                self._set_aside()
            if not self._file.lines.good:
                self._file.add(header)
            found = _bodies(self._file.lines)
            if found.bad:
                found.warn(f"; the file as it was is kept as {self._file.without(n for n, _ in found.bad).name}")
        except BaseException:
            self.close()
            raise
        self.done: set[str] = {r["id"] for _, r in found.good}

    def _belongs(self, header: dict[str, Any]) -> bool:
        """Whether the part is this run's; one without a whole line is anybody's."""
        found = self._file.lines
        return not (found.good or found.bad) or found.good[:1] == [(1, header)]

    def _set_aside(self) -> None:
        """Keep another run's part under another name, and begin a new one."""
        kept = set_aside(self.part)
        print(f"{self.part}: records of other settings, kept as {kept.name}; this run starts over", file=sys.stderr)
        self._file.close()
        self._file = LineFile(self.part)

    def add(self, record: dict[str, Any]) -> None:
        """Append one record; its "id" must be unique in the file."""
        if record["id"] in self.done:
            raise DataError(f"{self.output}: there is a record {record['id']!r} already")
        self._file.add(record)
        self.done.add(record["id"])

    def fail(self, record_id: str, error: Exception) -> None:
        """Record a failed request, apart from the results."""
        self.add({"id": record_id, "failure": f"{type(error).__name__}: {error}"})

    def finish(self) -> None:
        """Put the file in place."""
        self._file.sync()
        try:
            if self.output.is_file() and not self._remade():
                set_aside(self.output)
            os.replace(self.part, self.output)
        except OSError as error:
            raise DataError(f"cannot write {self.output}: {error}; finished records stay in {self.part}") from None
        self.close()

    def _remade(self) -> bool:
        """Whether the file in place holds the same measurement, which this run has made anew."""
        found = read_lines(self.output).good
        return found[:1] == [(1, self._header)]

    def close(self) -> None:
        """Stop here: another process may go on."""
        self._file.close()


def reopened(output: str | Path, settings: dict[str, Any]) -> RecordWriter:
    """A writer that goes on where a finished file of the same settings ended; DataError as for `RecordWriter`."""
    output = Path(output)
    part = output.with_name(f".{output.name}.part")
    if output.is_file() and read_settings(output) == settings:
        if part.exists():
            with LineFile(part):  # nobody is writing it
                set_aside(part)
        os.rename(output, part)
    return RecordWriter(output, settings)


def _bodies(found: Lines) -> Lines:
    """The lines behind the header; those without an id of their own are bad."""
    out = Lines(found.path, bad=list(found.bad), unchecked=found.unchecked - {1})
    seen: set[str] = set()
    for number, record in found.good[1:]:
        if not isinstance(record.get("id"), str):
            out.reject(number, "without an id")
        elif record["id"] in seen:
            out.reject(number, f"a second record {record['id'][:80]!r}")
        else:
            seen.add(record["id"])
            out.good.append((number, record))
    out.bad.sort()
    return out


@dataclass(frozen=True)
class RecordFile:
    """One record file in memory: settings, records, failed requests; `unchecked` lines without a checksum, `bad` lines.

    `bad` holds the number and the reason of every line that was left out.
    """

    settings: dict[str, Any]
    records: list[dict[str, Any]]
    failures: list[dict[str, Any]]
    unchecked: int = 0
    bad: tuple[tuple[int, str], ...] = ()


def read_file(path: str | Path) -> RecordFile:
    """All of a record file; bad lines are left out and named on stderr in one line.

    Raises
    ------
    DataError
        When it cannot be read or its header is none.
    """
    found = read_lines(path)
    head = found.good[0][1] if found.good and found.good[0][0] == 1 else None
    if head is None:
        why = dict(found.bad).get(1, "it is empty")
        raise DataError(f"{path} is not a record file: line 1: {why}")
    if head.get("schema") != SCHEMA:
        raise DataError(f"{path}: schema {head.get('schema')!r}, expected {SCHEMA!r}")
    if not isinstance(head.get("settings"), dict):
        raise DataError(f"{path} is not a record file: line 1 holds no settings")
    lines = _bodies(found)
    lines.warn()
    records = [r for _, r in lines.good if "failure" not in r]
    failures = [r for _, r in lines.good if "failure" in r]
    return RecordFile(head["settings"], records, failures, len(lines.unchecked), tuple(lines.bad))


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a record file's header."""
    return read_file(path).settings


def read_records(path: str | Path) -> Iterator[dict[str, Any]]:
    """The successful records of a file."""
    yield from read_file(path).records


def read_failures(path: str | Path) -> list[dict[str, Any]]:
    """The failed requests of a file."""
    return read_file(path).failures


def guarded(writer: RecordWriter, record_id: str, work: Callable[[], dict[str, Any]], keep: bool = True) -> None:
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
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file under a temporary name and rename it into place; DataError where it cannot be written."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as full:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise DataError(f"cannot write {path}: {full}") from None
