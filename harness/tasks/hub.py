"""Find the files of a public data set (given path, local folder, or the Hugging Face hub) and read checked rows.

The search order of `rows` is: the `path` given by the caller; `datasets/local/<name>/`; the hub. Tables (parquet,
csv) are read by `datasets`. JSON is read row by row with the standard library, because the JSON reader of
`datasets` turns date-like strings into timestamps and cannot hold the mixed-type pairs of the original releases.
"""

import glob
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import load_dataset
from huggingface_hub import snapshot_download

from cacheslide.errors import DataError
from harness.tasks.jsontext import parse
from harness.tasks.schema import Schema

LOCAL_DIR = Path(__file__).resolve().parents[2] / "datasets" / "local"
JSON_SUFFIXES = (".json", ".jsonl", ".txt")
SUFFIXES = (".parquet", ".csv", *JSON_SUFFIXES)


@dataclass(frozen=True)
class Source:
    """Location and row schema of a data set.

    Parameters
    ----------
    name : str
        Task name, also the name of its folder under `datasets/local/`.
    repo : str
        Data set on the Hugging Face hub, "owner/name".
    files : dict
        For every split, the pattern of its files inside the repository; `*` stands for the shard number.
    schema : Schema
        The fields a row must have, after `adapt`.
    adapt : callable, optional
        Converts older or sibling layouts of a row to the declared one; called as `adapt(row, where)`.
    """

    name: str
    repo: str
    files: dict[str, str]
    schema: Schema
    adapt: Callable[[dict[str, Any], str], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Row:
    """One checked row: `where` is "file, row n" (n counts from 1) for messages, `file` the file's name."""

    fields: dict[str, Any]
    where: str
    file: str

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]


def rows(source: Source, split: str, path: str | Path | None = None) -> Iterator[Row]:
    """Iterate over the rows of a split, in file order.

    Files are located immediately, so that a missing file is reported here; rows are read and checked lazily.

    Parameters
    ----------
    source : Source
        The data set.
    split : str
        Split name, for example "validation". Ignored when `path` is a file.
    path : str or Path, optional
        A json, jsonl, csv or parquet file in the schema of `source`, or a folder of them.

    Raises
    ------
    DataError
        When no file is found, the hub cannot be reached, or a row does not follow the schema.
    """
    files = locate(source, split, path)
    return _rows(source, files)


def limited(examples: Iterable, limit: int | None) -> Iterator:
    """The first `limit` examples (all when None)."""
    if limit is not None and limit < 0:
        raise DataError(f"limit must be 0 or more, not {limit}")
    return islice(examples, limit)


def row_rng(seed: int, task: str, row_id: str) -> random.Random:
    """Random generator that depends on the seed and the row only, not on the order in which rows are read."""
    return random.Random(f"{seed}/{task}/{row_id}")


def locate(source: Source, split: str, path: str | Path | None = None) -> list[Path]:
    """Files of a split: `path` itself, those in the folder `path`, those under `datasets/local/`, or the hub's."""
    if not re.fullmatch(r"[\w-]+", split):
        raise DataError(f"{source.name}: {split!r} is no split: a name of letters, digits, '_' and '-' is expected")
    if path is not None:
        path = Path(path)
        if not path.exists():
            raise DataError(f"{source.name}: {path} does not exist")
        if path.is_file():
            if path.suffix not in SUFFIXES:
                raise DataError(f"{path}: unknown file type {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
            return [path]
        return _require(source, split, path)
    return _in_folder(source, split, LOCAL_DIR / source.name) or _download(source, split)


def _require(source: Source, split: str, folder: Path) -> list[Path]:
    found = _in_folder(source, split, folder)
    if not found:
        expected = [source.files[split]] if split in source.files else []
        expected += [f"{split}{suffix}" for suffix in SUFFIXES]
        raise DataError(f"{folder}: no file for split {split!r}; expected one of {', '.join(expected)}")
    return found


def _in_folder(source: Source, split: str, folder: Path) -> list[Path]:
    """Files by the official name, with or without its folders, else `<split>.<suffix>` and its shards."""
    official = [source.files[split], Path(source.files[split]).name] if split in source.files else []
    plain = [f"{split}{shard}{suffix}" for suffix in SUFFIXES for shard in ("", "-*")]
    for pattern in official + plain + [f"data/{p}" for p in plain]:
        if found := sorted(folder.glob(pattern)):
            return found
    return []


def _download(source: Source, split: str) -> list[Path]:
    if split not in source.files:
        raise DataError(f"{source.name}: no split {split!r}; known splits: {', '.join(source.files)}")
    pattern = source.files[split]
    try:
        folder = Path(snapshot_download(source.repo, repo_type="dataset", allow_patterns=[pattern]))
    except Exception as error:  # the hub client's errors share no base class
        file = pattern.replace("*", "00000-of-00001")
        shards = " (and its further shards, if any)" if "*" in pattern else ""
        raise DataError(
            f"{source.name}: cannot download {source.repo!r} from the Hugging Face hub (is there a network? "
            f"{type(error).__name__}); "
            f"put its file {file}{shards} into {_shown(LOCAL_DIR / source.name)}/, or give its path"
        ) from error
    return _require(source, split, folder)


def _shown(path: Path) -> str:
    """A path inside the repository as seen from its root."""
    root = Path(__file__).resolve().parents[2]
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _rows(source: Source, files: list[Path]) -> Iterator[Row]:
    for file in files:
        empty = True
        for number, raw in _read(file, source.schema):
            empty = False
            where = f"{file}, row {number}"
            if source.adapt is not None and isinstance(raw, dict):
                raw = source.adapt(raw, where)
            yield Row(source.schema.check(raw, where), where, file.name)
        if empty:
            raise DataError(f"{file}: holds no rows")


def _read(file: Path, schema: Schema) -> Iterator[tuple[int, Any]]:
    """Row number (from 1; the line number for JSON lines) and raw row."""
    if file.suffix in JSON_SUFFIXES:
        yield from json_rows(file)
        return
    kind = file.suffix.removeprefix(".")
    # csv is untyped: without declared types, numeric ids would become numbers
    features = schema.features if kind == "csv" else None
    try:
        table = load_dataset(
            kind, data_files={"all": glob.escape(str(file))}, split="all", streaming=True, features=features
        )
        yield from enumerate(table, start=1)
    except Exception as error:  # pyarrow, pandas and datasets each raise their own
        raise DataError(f"{file}: not a readable {kind} file in this schema ({_first_line(error)})") from error


def json_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Row number (from 1) and row of a JSON list or of JSON lines (then the line's number); DataError names the row."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            if lines.read(64).lstrip().startswith("["):
                lines.seek(0)
                yield from enumerate(parse(lines.read(), f"{file}:"), start=1)
                return
            lines.seek(0)
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, parse(line, f"{file}, row {number}:")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not valid JSON ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
