"""JSON lines with checksums, in a file that a kill at any moment leaves valid except for the line being written.

A sealed line ends in `, "crc": "0123456789abcdef"}`: XXH3 of the object's bytes without it. Finished lines are never
rewritten: files grow by appending, and resuming cuts off only a torn tail.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from cacheslide import renamed
from cacheslide.errors import DataError

SEAL = re.compile(rb'(?:, |(?<=^\{))"crc": "([0-9a-f]{16})"\}$')
LENGTH = 28  # bytes of a seal with its closing brace
SHOWN = 5  # maximum bad lines named in a warning


def seal(record: Mapping[str, Any]) -> bytes:
    """The record as one line with checksum and newline; ValueError if it has a field "crc" itself."""
    if "crc" in record:
        raise ValueError("a record's field 'crc' is its checksum")
    body = json.dumps(record, sort_keys=True).encode()
    comma = b", " if len(body) > 2 else b""
    return body[:-1] + comma + b'"crc": "' + xxhash.xxh3_64_hexdigest(body).encode() + b'"}\n'


def unseal(line: bytes) -> tuple[dict[str, Any], bool]:
    """The record of a line, and whether it has a valid checksum; short ValueError for an invalid line."""
    match = SEAL.search(line[-LENGTH:])
    body = line[: match.start() - match.end()] + b"}" if match else line
    if match and xxhash.xxh3_64_hexdigest(body).encode() != match[1]:
        raise ValueError("its checksum does not fit")
    try:
        record = renamed.record(json.loads(body))
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or beyond the limits of numbers or nesting
        raise ValueError("not JSON") from None
    if not isinstance(record, dict):
        raise ValueError("not an object")
    if match is None and "crc" in record:
        raise ValueError("its checksum is damaged")
    return record, match is not None


@dataclass
class Lines:
    """The lines of a file: number (from 1) and record of good lines, number and reason of bad ones.

    `unchecked` holds the numbers of good lines without checksum, as in files of earlier versions; `end` is the offset
    in bytes behind the last complete line, `torn` whether the file has more bytes.
    """

    path: Path
    good: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    unchecked: set[int] = field(default_factory=set)
    end: int = 0
    torn: bool = False

    def reject(self, number: int, reason: str) -> None:
        """Count a line as bad."""
        self.bad.append((number, reason))

    def warn(self, more_to_say: str = "") -> None:
        """Print one line on stderr that names the bad lines, if there are any."""
        if self.bad:
            named = ", ".join(f"line {n}: {why}" for n, why in self.bad[:SHOWN])
            rest = f", and {len(self.bad) - SHOWN} more" if len(self.bad) > SHOWN else ""
            print(f"{self.path}: {len(self.bad)} bad lines are left out ({named}{rest}){more_to_say}", file=sys.stderr)


def read_lines(path: str | Path) -> Lines:
    """All lines of a file; DataError if it cannot be read.

    After a line with a checksum, lines without are bad. A last line without newline counts if it is complete.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    return parse(raw, Path(path))


def parse(raw: bytes, path: Path) -> Lines:
    """The lines in `raw`, the content of `path`."""
    out, sealed = Lines(path, end=raw.rfind(b"\n") + 1), False
    out.torn = out.end < len(raw)
    for number, line in enumerate(_split(raw), 1):
        try:
            record, checked = unseal(line)
            if sealed and not checked:
                raise ValueError("without a checksum")
            sealed = checked
        except ValueError as wrong:
            out.reject(number, str(wrong))
            continue
        if not checked:
            out.unchecked.add(number)
        out.good.append((number, record))
    return out


def _split(raw: bytes) -> Iterator[bytes]:
    lines = raw.split(b"\n")
    return iter(lines[:-1] if lines[-1] == b"" else lines)


class LineFile:
    """Appends sealed lines to a file, for one process at a time.

    Opening cuts off a torn last line. The kernel releases the lock with the process.

    Parameters
    ----------
    path : Path
        The file; created with its folder if missing.

    Raises
    ------
    DataError
        If another process writes the file, or if it cannot be opened, read or written. Its content stays.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._told():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = self._locked()
        try:
            with self._told():
                raw = _all(self._fd)
                self.lines = parse(raw, self.path)
                self._end = len(raw)
                if self.lines.torn:
                    self._mend(raw)
        except BaseException:
            self.close()
            raise

    def _locked(self) -> int:
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(fd), os.stat(self.path)):
                    return fd
            except BlockingIOError:
                os.close(fd)
                raise DataError(f"{self.path}: another process is writing it") from None
            except FileNotFoundError:
                pass  # moved between opening and locking; the next lines detect it
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):  # no locks on this file system
                    return fd
                os.close(fd)
                raise
            os.close(fd)

    def _mend(self, raw: bytes) -> None:
        """Complete a valid last line with its newline; cut off a torn one."""
        tail = self.lines.end
        bad = self.lines.bad
        if bad and bad[-1][0] == raw.count(b"\n") + 1:
            bad.pop()
            os.ftruncate(self._fd, tail)
            self._end = tail
        else:
            self._write(b"\n")

    def add(self, *records: Mapping[str, Any]) -> None:
        """Append records; DataError if they cannot be written, with the file unchanged."""
        with self._told():
            self._write(b"".join(map(seal, records)))

    def _write(self, data: bytes) -> None:
        view, end = memoryview(data), self._end
        try:
            while view:
                n = os.pwrite(self._fd, view, end)
                view, end = view[n:], end + n
        except OSError:
            with contextlib.suppress(OSError):  # a partial line; if this fails too, the next start cuts it off
                os.ftruncate(self._fd, self._end)
            raise
        self._end = end

    def without(self, numbers: Iterable[int], *ahead: Mapping[str, Any]) -> Path:
        """Remove these lines and put the records `ahead` in front; returns the path of the old file's copy.

        The replacement is atomic.
        """
        out, part = set(numbers), self.path.with_name(f"{self.path.name}.new")
        with self._told():
            lines = _all(self._fd)[: self._end].split(b"\n")
            fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            old, self._fd, self._end = self._fd, fd, 0
            try:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                kept_lines = (line + b"\n" for n, line in enumerate(lines[:-1], 1) if n not in out)
                self._write(b"".join([*map(seal, ahead), *kept_lines]))
                os.fsync(fd)
                kept = set_aside(self.path, copy=True)
                os.replace(part, self.path)
            finally:
                os.close(old)
        return kept

    def sync(self) -> None:
        """Wait until added lines are on the device."""
        with self._told():
            os.fsync(self._fd)

    def close(self) -> None:
        """Close the file and release its lock."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def __enter__(self) -> "LineFile":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"cannot write {self.path}: {error}; finished lines stay in it") from None


def set_aside(path: Path, copy: bool = False) -> Path:
    """Move a file to `.NAME.old`, `.NAME.old.2`, ..., the first free name; with `copy` it also stays in place."""
    number, kept = 1, path.with_name(f".{path.name.removeprefix('.')}.old")
    first = kept.name
    while kept.exists():
        number += 1
        kept = path.with_name(f"{first}.{number}")
    try:
        if copy:
            shutil.copyfile(path, kept)
        else:
            os.rename(path, kept)
    except OSError as error:
        raise DataError(f"cannot keep {path} as {kept.name}: {error}") from None
    return kept


def _all(fd: int) -> bytes:
    parts, at = [], 0
    while part := os.pread(fd, 1 << 24, at):
        parts.append(part)
        at += len(part)
    return b"".join(parts)
