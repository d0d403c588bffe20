"""Retrieval: the passages of every sample ranked for its question, and how many needed ones are among the first k."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cacheslide.errors import ConfigError, DataError
from cacheslide.plain_values import read_json, shown
from harness.rag.per_sample import Record, measured
from harness.rag.retrievers.base import Index, Retriever, ranking
from harness.rag.samples import SampleFile, needed_passages, read_samples
from harness.tasks.passages import PassageRow

SCHEMA = "cacheslide.rag.retrieval/1"


def retrieval_path(results: Path, name: str, k: int) -> Path:
    """Where the result for data set `name` is written; "both": one run makes the index and searches it."""
    return results / "retrieval" / f"{name}_rag_both_k{k}.json"


class Indices:
    """Indices of samples; neighbouring samples over the same passages share one."""

    def __init__(self, retriever: Retriever) -> None:
        self.retriever, self._latest = retriever, ((), None)

    def of(self, row: PassageRow) -> Index:
        """The index of a row's passages."""
        passages, index = self._latest
        if index is None or passages != row.passages:
            self._latest = row.passages, self.retriever.index(row.passages)
        return self._latest[1]


def retrieve(samples: SampleFile, retriever: Retriever, k: int, out: Path) -> dict[str, Any]:
    """Rank the passages of every sample, and write the result to `out`; returns it.

    The result holds ids, hashes, indices and scores, and no text.
    """
    if k < 1:
        raise ConfigError(f"k must be at least 1, not {k}")
    indices = Indices(retriever)

    def work(row: PassageRow) -> Record:
        began = time.perf_counter()
        index = indices.of(row)
        indexed = time.perf_counter()
        scores = index.scores(row.question)
        ended = time.perf_counter()
        needed, marked_by = needed_passages(row)
        ranked = ranking(scores)
        return {
            "sha256": row.sha256,
            "passages": len(row.passages),
            "ranked": ranked,
            "scores": [round(float(scores[i]), 6) for i in ranked],
            "top_k": ranked[:k],
            "needed": list(needed),
            "needed_by": marked_by,
            "index_s": indexed - began,
            "search_s": ended - indexed,
        }

    settings = {"schema": SCHEMA, "data": samples.about(), "retriever": retriever.about, "k": k}
    settings["samples"] = len(samples.rows)
    return measured(out, settings, samples, work, "retrieval", lambda records: summary(records, k))


def summary(records: Sequence[Record], k: int) -> dict[str, Any]:
    """Means over the samples of which some needed passage is known, by number of retrieved passages.

    hits: at least one needed passage is among them; recall: the share of needed ones; all: whether all of them are.
    """
    known = [r for r in records if r["needed"]]
    by_k = [{"k": n, **{name: _mean(known, n, name) for name in MEASURES}} for n in range(1, k + 1)]
    return {
        "samples": len(records),
        "with_needed": len(known),
        "needed_by": sorted({r["needed_by"] for r in known}),
        "by_k": by_k,
        "at_k": by_k[-1],
        "index_s": sum(r["index_s"] for r in records),
        "search_s": sum(r["search_s"] for r in records),
    }


MEASURES = {
    "hits": lambda needed, top: float(bool(needed & top)),
    "recall": lambda needed, top: len(needed & top) / len(needed),
    "all": lambda needed, top: float(needed <= top),
}


def _mean(records: Sequence[Record], k: int, name: str) -> float | None:
    values = [MEASURES[name](set(r["needed"]), set(r["ranked"][:k])) for r in records]
    return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Retrieved:
    """A retrieval result with its samples' text: `ranked[id]` has the indices of a sample's passages, best first."""

    path: Path
    samples: SampleFile
    k: int
    retriever: str
    ranked: dict[str, list[int]]


def read_retrieval(path: Path, data: Path | None = None, count: int | None = None) -> Retrieved:
    """Read a result, and its first `count` samples (None: all) from `data`, by default the file it was made from.

    Raises
    ------
    DataError
        If the result is missing or damaged, or if the data file is another one.
    """
    if not path.is_file():
        raise DataError(f"{path}: no retrieval result there; run the retrieval step first (docs/rag.md)")
    held = read_json(path, DataError)
    schema = held.get("schema") if isinstance(held, dict) else None
    if schema != SCHEMA:
        raise DataError(f"{path} is not a retrieval result: schema {shown(schema)}, expected {SCHEMA!r}")
    try:
        source, k, name = held["data"], int(held["k"]), str(held["retriever"]["name"])
        ranked = {r["id"]: (r["sha256"], list(map(int, r["ranked"]))) for r in held["samples"]}
        expected = source["sha256"]
        place = Path(data or source["path"])
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{path}: damaged; run the retrieval step again") from None
    samples = read_samples(place)
    if samples.sha256 != expected:
        raise DataError(f"{place}: not the file that {path} was made from (its SHA-256 differs)")
    rows = tuple(row for row in samples.rows if row.id in ranked)
    if count is not None and len(rows) < count:
        raise DataError(f"{path}: {count} samples are asked for, the result holds {len(rows)}")
    for row in rows[:count]:
        digest, order = ranked[row.id]
        if digest != row.sha256 or sorted(order) != list(range(len(row.passages))):
            raise DataError(f"{path}: sample {row.id!r} does not fit the row of that id in {place}")
    kept = SampleFile(samples.path, samples.name, samples.sha256, rows[:count], samples.metric)
    return Retrieved(path, kept, k, name, {row.id: ranked[row.id][1] for row in rows[:count]})
