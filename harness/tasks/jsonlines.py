"""Files of JSON lines: written whole or not at all, and read with the place of a bad line."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cacheslide.errors import DataError
from harness.tasks.jsontext import parse


def write_lines(path: Path, rows: Iterable[Any]) -> str:
    """Write one JSON value per line, the same bytes for the same rows; returns the file's SHA-256.

    A failure leaves no half-written file.
    """
    digest, partial = hashlib.sha256(), path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            for row in rows:
                line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
                digest.update(line)
                file.write(line)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return digest.hexdigest()


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The place (`path:line`) and the value of every line; DataError for a line that is not UTF-8 or not JSON."""
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if not line.isascii() and any("\udc80" <= c <= "\udcff" for c in line):
                raise DataError(f"{where}: not UTF-8")
            yield where, parse(line, f"{where}:")
