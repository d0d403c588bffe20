"""Per-request records as JSON lines, written so that an interrupted run resumes and failures stay apart.

While a run is under way its records sit in `.<output>.part`; `finish` renames it into place. The first line is a
header with the run's settings: a part whose header differs belongs to another run and is set aside. Lines carry
checksums (`harness.results.lines`); what a kill or a damaged byte leaves bad is named, left out and measured again.

The header stands twice: in line 1, and again behind the first record, so that no damage to one line, its newline
included, takes both. Where line 1 is damaged the copy says which settings the records belong to. Files of earlier
versions have no copy and are read all the same (a run that goes on appends it); with a damaged line 1 nothing vouches
for their settings: a part is set aside under a message that names the line, and reading one is a DataError.
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
        """Whether the part is this run's; one without a whole line is anybody's."""
        found = self._file.lines
        return not (found.good or found.bad) or _same(_header(found), self._header)

    def _set_aside(self) -> None:
        """Keep a part that is not this run's, or not known to be, under another name, and begin a new one."""
        kept, why = set_aside(self.part), dict(self._file.lines.bad).get(1)
        theirs = (
            "records of other settings"
            if why is None or _header(self._file.lines)
            else (
                f"the header is damaged (line 1: {why}) and has no copy, so the settings of its records are not known"
            )
        )
        print(f"{self.part}: {theirs}, kept as {kept.name}; this run starts over", file=sys.stderr)
        self._file.close()
        self._file = LineFile(self.part)

    def _begin(self) -> set[str]:
        """Write what is missing of the two headers, and leave out bad lines; the ids of the records that are there."""
        lines = self._file.lines
        headers = sum(_same(line, self._header) for _, line in lines.good)
        if not (lines.good or lines.bad):
            self._file.add(self._header)
        found = _bodies(lines, self._header)
        if found.bad:
            out = [n for n, _ in found.bad]
            ahead = [self._header] if 1 in out else []
            headers += len(ahead)
            kept = self._file.without(out, *ahead)
            found.warn(f"; the file as it was is kept as {kept.name}")
        if found.good and headers < 2:
            self._file.add(self._header)
        return {r["id"] for _, r in found.good}

    def add(self, record: dict[str, Any]) -> None:
        """Append one record; its "id" must be unique in the file."""
        if record["id"] in self.done:
            raise DataError(f"{self.output}: there is a record {record['id']!r} already")
        self._file.add(record, *([] if self.done else [self._header]))
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
        return _same(_header(read_lines(self.output)), self._header)

    def close(self) -> None:
        """Stop here: another process may go on."""
        self._file.close()


def reopened(output: str | Path, settings: dict[str, Any]) -> RecordWriter:
    """A writer that goes on where a finished file of the same settings ended; DataError as for `RecordWriter`."""
    output = Path(output)
    part = output.with_name(f".{output.name}.part")
    if output.is_file() and read_settings(output) == json.loads(json.dumps(settings)):  # a tuple is read as a list
        if part.exists():
            with LineFile(part):  # nobody is writing it
                set_aside(part)
        os.rename(output, part)
    return RecordWriter(output, settings)


def _same(one: dict[str, Any] | None, other: dict[str, Any]) -> bool:
    """Whether two lines say the same; compared as text, since a NaN is not equal to itself."""
    return one is not None and one.keys() == other.keys() and seal(one) == seal(other)


def _header(found: Lines) -> dict[str, Any] | None:
    """The first header with a checksum, else what stands in line 1; None where neither can be read."""
    for number, line in found.good:
        if number not in found.unchecked and line.keys() == {"schema", "settings"} and line["schema"] == SCHEMA:
            return line
    return next((line for number, line in found.good[:1] if number == 1), None)


def _bodies(found: Lines, header: dict[str, Any]) -> Lines:
    """The records; lines that are neither the header nor have an id of their own are bad."""
    out = Lines(found.path, bad=[(n, f"the header: {why}" if n == 1 else why) for n, why in found.bad])
    seen: set[str] = set()
    for number, record in found.good:
        if _same(record, header):
            continue
        if number == 1:
            out.reject(1, "the header: its checksum is damaged")  # there is a header with a checksum, and it differs
        elif not isinstance(record.get("id"), str):
            out.reject(number, "without an id")
        elif record["id"] in seen:
            out.reject(number, f"a second record {record['id'][:80]!r}")
        else:
            seen.add(record["id"])
            out.good.append((number, record))
    out.unchecked = found.unchecked & {n for n, _ in out.good}
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
    """All of a record file; bad lines, a damaged header too, are left out and named on stderr in one line.

    Raises
    ------
    DataError
        When it cannot be read, or neither line 1 nor a copy of it is a header.
    """
    found = read_lines(path)
    head = _header(found)
    if head is None:
        why = dict(found.bad).get(1, "it is empty")
        raise DataError(f"{path} is not a record file: line 1: {why}")
    if head.get("schema") != SCHEMA:
        raise DataError(f"{path}: schema {head.get('schema')!r}, expected {SCHEMA!r}")
    if not isinstance(head.get("settings"), dict):
        raise DataError(f"{path} is not a record file: line 1 holds no settings")
    lines = _bodies(found, head)
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
    """Write JSON under a temporary name and rename it into place: see `pretty`."""
    write_text(path, pretty(content) + "\n")


def pretty(content: Any) -> str:
    """JSON with a field a line, and an item of a list of objects a line, without indentation.

    Two versions can be compared line by line, and a table is not mostly blanks.
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
