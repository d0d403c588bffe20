"""Tables of the sweep of WCA's open points: F1 by hop depth and row-layers computed, each option vs. the default.

Intervals are 95 % and resample prompts. A comparison is paired: both cells answered the same questions.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from harness.results import intervals
from harness.results.records import read_records, read_settings

SCHEMA = "cacheslide.wca/1"
DIGITS = 4  # significant digits of a summary; intervals are far wider
Records = dict[str, dict[str, dict[str, Any]]]  # cell -> example -> record


class Described(Protocol):
    """The attributes of a cell that tables use."""

    name: str

    def describe(self) -> dict[str, Any]: ...


def read_sweep(path: Path) -> tuple[dict[str, Any], Records]:
    """Settings and records of one model's sweep."""
    records: Records = defaultdict(dict)
    for record in read_records(path):
        records[record["cell"]][record["example"]] = record
    return read_settings(path), dict(records)


def tabulate(done: Mapping[str, tuple[dict[str, Any], Records]], cells: Sequence[Described]) -> dict[str, Any]:
    """The content of summary.json: one row per cell for each model and mix, in the order of `cells`."""
    out: dict[str, Any] = {"schema": SCHEMA, "level": intervals.LEVEL, "models": {}}
    for kind, (settings, records) in done.items():
        mixes = sorted({r["mix"] for cell in records.values() for r in cell.values()})
        tables = {mix: _table(_of(records, mix), cells) for mix in mixes}
        devices = sorted({r["device"] for cell in records.values() for r in cell.values()})
        out["models"][kind] = {"settings": settings, "devices": devices, "mixes": tables}
    return out


def _of(records: Records, mix: str) -> Records:
    return {c: {e: r for e, r in examples.items() if r["mix"] == mix} for c, examples in records.items()}


def _table(records: Records, cells: Sequence[Described]) -> list[dict[str, Any]]:
    rows = []
    for cell in cells:
        own = records.get(cell.name)
        if not own:
            continue
        about = cell.describe()
        row = {"cell": cell.name, **about, "prompts": len(own), **_means(own.values()), "f1": _f1(own.values())}
        depths = sorted({v for r in own.values() for v in r["depth"]})
        row["by_depth"] = [{"depth": v, "f1": _f1(own.values(), "depth", v)} for v in depths]
        # Nearly every cell answers all others correctly: one number summarises them.
        volatile = [f1 for r in own.values() for f1, v in zip(r["f1"], r["volatile"], strict=True) if v]
        row["f1_volatile"] = sum(volatile) / len(volatile) if volatile else None
        row["loss_points"] = _paired(records.get("recompute"), own)
        row["gain_points"] = _paired(own, records.get(about["base"]))
        rows.append(row)
    return rows


def _means(own: Iterable[dict[str, Any]]) -> dict[str, Any]:
    own = list(own)
    alphas = [r["alpha"] for r in own if r["alpha"] is not None]
    reused = sum(r["tokens_reused"] + r["tokens_recomputed"] for r in own)
    return {
        "compute_fraction": sum(r["compute_fraction"] for r in own) / len(own),
        "recomputed_share": sum(r["tokens_recomputed"] for r in own) / reused if reused else None,
        "alpha": sum(alphas) / len(alphas) if alphas else None,
    }


def _f1(own: Iterable[dict[str, Any]], field: str | None = None, value: Any = None) -> dict[str, Any]:
    pairs = [
        (f1, r["example"])
        for r in own
        for f1, kind in zip(r["f1"], r[field] if field else r["f1"], strict=True)
        if field is None or kind == value
    ]
    return intervals.mean([p[0] for p in pairs], [p[1] for p in pairs])


def _paired(one: dict[str, dict] | None, two: dict[str, dict] | None) -> dict[str, Any] | None:
    """F1 points of `one` minus `two`, over prompts that both answered."""
    both = [e for e in one or {} if e in (two or {})]
    if not both:
        return None
    a, b = ([f1 for e in both for f1 in x[e]["f1"]] for x in (one, two))
    return intervals.points_lost(a, b, [e for e in both for _ in one[e]["f1"]])
