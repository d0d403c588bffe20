"""Per-request records as JSON lines, written so that an interrupted run resumes and failures stay apart.

While a run is in progress its records are in `.<output>.part`; `finish` renames it. The first line is a header with the
run's settings: a part with another header belongs to another run and is set aside. Lines have checksums
(`harness.results.lines`); lines damaged by a kill or otherwise are named, left out and measured again.

The header is written twice, in line 1 and behind the first record, so that damage to one line, its newline included,
cannot destroy both. If line 1 is damaged, the copy gives the settings. Files of earlier versions have no copy and are
read anyway (a resumed run appends it); with a damaged line 1 their settings are unknown: a part is set aside with a
message that names the line, and reading such a file is a DataError.
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
from harness.results.lines import LineFile, Lines, read_lines, seal, set_aside

SCHEMA = "cacheslide.records/1"


class RecordWriter:
    """Appends records to `output`, skipping those made by an interrupted run.

    Parameters
    ----------
    output : Path
        Final path of the records.
    settings : dict
        Everything the records depend on; JSON-serialisable.

    Raises
    ------
    DataError
        If another process writes these records, or if they cannot be written. Finished records are never lost.
    """

    def __init__(self, output: str | Path, settings: dict[str, Any]) -> None:
        self.output = Path(output)
        self.part = self.output.with_name(f".{self.output.name}.part")
        self._header = json.loads(json.dumps({"schema": SCHEMA, "settings": settings}))
        self._file = LineFile(self.part)
        try:
            if not self._belongs():
                self._set_aside()
            self.done: set[str] = self._begin()
        except BaseException:
            self.close()
            raise

    def _belongs(self) -> bool:
        """Whether the part is this run's; a part without a complete line is."""
        lines = self._file.lines
        return not (lines.good or lines.bad) or _same(_header(lines), self._header)

    def _set_aside(self) -> None:
        """Rename a part that is another run's, or of unknown settings, and begin a new one."""
        kept, why = set_aside(self.part), dict(self._file.lines.bad).get(1)
        reason = (
            "records of other settings"
            if why is None or _header(self._file.lines)
            else (
                f"the header is damaged (line 1: {why}) and has no copy, so the settings of its records are not known"
            )
        )
        print(f"{self.part}: {reason}, kept as {kept.name}; this run starts over", file=sys.stderr)
        self._file.close()
        self._file = LineFile(self.part)

    def _begin(self) -> set[str]:
        """Write missing headers and remove bad lines; returns the ids of existing records."""
        lines = self._file.lines
        headers = sum(_same(line, self._header) for _, line in lines.good)
        if not (lines.good or lines.bad):
            self._file.add(self._header)
        bodies = _bodies(lines, self._header)
        if bodies.bad:
            out = [n for n, _ in bodies.bad]
            ahead = [self._header] if 1 in out else []
            headers += len(ahead)
            kept = self._file.without(out, *ahead)
            bodies.warn(f"; the file as it was is kept as {kept.name}")
        if bodies.good and headers < 2:
            self._file.add(self._header)
        return {r["id"] for _, r in bodies.good}

    def add(self, record: dict[str, Any]) -> None:
        """Append one record; its "id" must be unique in the file."""
        if record["id"] in self.done:
            raise DataError(f"{self.output}: there is a record {record['id']!r} already")
        self._file.add(record, *([] if self.done else [self._header]))
        self.done.add(record["id"])

    def fail(self, record_id: str, error: Exception) -> None:
        """Record a failed request, separate from results."""
        self.add({"id": record_id, "failure": f"{type(error).__name__}: {error}"})

    def finish(self) -> None:
        """Rename the part to the output."""
        self._file.sync()
        try:
            if self.output.is_file() and not self._remade():
                set_aside(self.output)
            os.replace(self.part, self.output)
        except OSError as error:
            raise DataError(f"cannot write {self.output}: {error}; finished records stay in {self.part}") from None
        self.close()

    def _remade(self) -> bool:
        """Whether the output holds the same measurement, which this run has repeated."""
        return _same(_header(read_lines(self.output)), self._header)

    def close(self) -> None:
        """Stop writing: another process may resume."""
        self._file.close()


def reopened(output: str | Path, settings: dict[str, Any]) -> RecordWriter:
    """A writer that continues a finished file with the same settings; DataError as for `RecordWriter`."""
    output = Path(output)
    part = output.with_name(f".{output.name}.part")
    if output.is_file() and read_settings(output) == json.loads(json.dumps(settings)):  # JSON turns tuples into lists
        if part.exists():
            with LineFile(part):  # not being written
                set_aside(part)
        os.rename(output, part)
    return RecordWriter(output, settings)


def _same(one: dict[str, Any] | None, other: dict[str, Any]) -> bool:
    """Whether two lines are equal as JSON text, since a NaN is not equal to itself."""
    return one is not None and one.keys() == other.keys() and seal(one) == seal(other)


def _header(lines: Lines) -> dict[str, Any] | None:
    """The first header with a checksum, else line 1; None if neither can be read."""
    for number, line in lines.good:
        if number not in lines.unchecked and line.keys() == {"schema", "settings"} and line["schema"] == SCHEMA:
            return line
    return next((line for number, line in lines.good[:1] if number == 1), None)


def _bodies(lines: Lines, header: dict[str, Any]) -> Lines:
    """The records; lines that are neither the header nor have a unique id are bad."""
    out = Lines(lines.path, bad=[(n, f"the header: {why}" if n == 1 else why) for n, why in lines.bad])
    seen: set[str] = set()
    for number, record in lines.good:
        if _same(record, header):
            continue
        if number == 1:
            out.reject(1, "the header: its checksum is damaged")  # another header has a valid checksum
        elif not isinstance(record.get("id"), str):
            out.reject(number, "without an id")
        elif record["id"] in seen:
            out.reject(number, f"a second record {record['id'][:80]!r}")
        else:
            seen.add(record["id"])
            out.good.append((number, record))
    out.unchecked = lines.unchecked & {n for n, _ in out.good}
    out.bad.sort()
    return out


@dataclass(frozen=True)
class RecordFile:
    """A record file in memory: settings, records, failed requests; `unchecked` lines without checksum, `bad` lines.

    `bad` holds number and reason of every line left out.
    """

    settings: dict[str, Any]
    records: list[dict[str, Any]]
    failures: list[dict[str, Any]]
    unchecked: int = 0
    bad: tuple[tuple[int, str], ...] = ()


def read_file(path: str | Path) -> RecordFile:
    """Read a record file; bad lines, a damaged header included, are left out and named in one line on stderr.

    Raises
    ------
    DataError
        If it cannot be read, or neither line 1 nor its copy is a header.
    """
    content = read_lines(path)
    head = _header(content)
    if head is None:
        why = dict(content.bad).get(1, "it is empty")
        raise DataError(f"{path} is not a record file: line 1: {why}")
    if head.get("schema") != SCHEMA:
        raise DataError(f"{path}: schema {head.get('schema')!r}, expected {SCHEMA!r}")
    if not isinstance(head.get("settings"), dict):
        raise DataError(f"{path} is not a record file: line 1 holds no settings")
    lines = _bodies(content, head)
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
    """Run `work()` and store its record; an expected error becomes a failure record, others end the run.

    Without `keep` the record is not stored: the caller extends it first.
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
    """Write JSON (see `pretty`) under a temporary name and rename it."""
    write_text(path, pretty(content) + "\n")


def pretty(content: Any) -> str:
    """JSON with one field per line, and one item per line in lists of objects, without indentation.

    Versions can be compared line by line, without the size of indentation.
    """
    if isinstance(content, dict) and content:
        fields = (f"{json.dumps(str(key))}: {pretty(content[key])}" for key in sorted(content))
        return "{\n" + ",\n".join(fields) + "\n}"
    if isinstance(content, list) and any(isinstance(item, dict | list) for item in content):
        return "[\n" + ",\n".join(map(_line, content)) + "\n]"
    return _line(content)


def _line(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file under a temporary name and rename it; DataError if it cannot be written."""
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
