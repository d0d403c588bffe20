"""Tables of a reproduction's records: TTFT of engines, energy, servers, each with intervals.

Rows of a cell are those of `harness.results.serving`, with what only these records have: percentiles over requests,
clocks and power. A turn that other work disturbed is left out on both sides of a ratio.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from cacheslide.units import GIB
from harness.backends.client import Result
from harness.backends.http.load import Load
from harness.experiments.serving import client
from harness.metrics.bootstrap import ratio_of_medians
from harness.results import serving
from harness.results.intervals import as_json, mean, median, p95, p99
from harness.results.undisturbed import pick, together, too_few

RECOMPUTE = "recompute"
POINT = ("tokens", "batch", "reused", "prefix_caching", "axis", "kind")
Record = Mapping[str, Any]
Row = dict[str, Any]


def ttft_rows(records: Iterable[Record]) -> list[Row]:
    """A row per cell and arm: TTFT in ms, its ratio to recompute in the same turns, requests a second, GPU."""
    rows = []
    for record in records:
        if record["cell"]["kind"] not in ("ttft", "grid"):
            continue
        arms, point = record["arms"], {name: record["cell"][name] for name in POINT}
        for row in serving.tables(_cells(record)):
            runs = arms[row["system"]]["runs"]
            kept = pick(runs, [run.get("quiet") for run in runs])
            ms = [1e3 * x for run in kept for x in run["ttft"]]
            rows.append(row | point | {"requests_ms": spread(ms), "gpu": gpu_of(kept)})
    return rows


def _cells(record: Record) -> list[Row]:
    """A record's arms as the cells of `engine_ttft`."""
    at = {name: record["cell"][name] for name in ("tokens", "batch")} | {"kind": "cell", "store": "model"}
    return [at | {"system": name, **arm} for name, arm in record["arms"].items()]


def spread(values: Sequence[float]) -> Row:
    """Mean, median, 95th and 99th percentile over requests."""
    return {"mean": mean(values), "median": median(values), "p95": p95(values), "p99": p99(values)}


def gpu_of(runs: Sequence[Record]) -> Row | None:
    """Clocks, power and memory beside runs; None where no GPU was read."""
    readings = [run["gpu"] for run in runs if run.get("gpu")]
    if not readings:
        return None
    middle = [r["sm_mhz"][1] for r in readings]
    return {
        "sm_mhz": [min(r["sm_mhz"][0] for r in readings), float(np.median(middle)),
                   max(r["sm_mhz"][2] for r in readings)],
        "power_max_w": max(r["power_max_w"] for r in readings),
        "memory_gib": max(r["memory_bytes"] for r in readings) / GIB,
        "idle_w": readings[-1]["idle_w"],
    }  # fmt: skip


def energy_rows(records: Iterable[Record]) -> list[Row]:
    """A row per arm: joules a request over blocks of requests back to back, and recompute's over it, by turns."""
    rows = []
    for record in records:
        if record["cell"]["kind"] != "energy":
            continue
        base = record["arms"].get(RECOMPUTE, {}).get("runs", [])
        for name, arm in record["arms"].items():
            runs = [run for run in arm["runs"] if run.get("gpu")]
            if arm["failed"] or not runs:
                continue
            both = list(zip(base, arm["runs"], strict=False))
            quiet = [together([a.get("quiet"), b.get("quiet")]) for a, b in both]
            few = too_few(quiet)
            row: Row = {k: record["cell"][k] for k in POINT} | {"system": name, "disturbed": few}
            kept = pick(runs, [run.get("quiet") for run in runs])
            row["joules"] = median([_joules(run) for run in kept])
            row["joules_above_idle"] = median([_joules(run, above=True) for run in kept])
            row["idle_w"], row["power_mean_w"] = kept[-1]["gpu"]["idle_w"], kept[-1]["gpu"]["power_mean_w"]
            row["requests"] = sum(run["requests"] for run in kept)
            if name != RECOMPUTE and not few and all(a.get("gpu") for a, _ in both) and both:
                pairs = [[_joules(run) for run in of] for of in zip(*pick(both, quiet), strict=True)]
                row["recompute_over_joules"] = as_json(ratio_of_medians(*pairs))
            rows.append(row)
    return rows


def _joules(run: Record, above: bool = False) -> float:
    """Joules a request: by the driver's counter, else power integrated; `above` idle power."""
    gpu = run["gpu"]
    total = gpu["energy_j"] if gpu["energy_counter_j"] is None else gpu["energy_counter_j"]
    rest = (gpu["idle_w"] or 0.0) * gpu["seconds"] if above else 0.0
    return (total - rest) / run["requests"]


def server_rows(records: Sequence[Record], token_gib: float) -> list[Row]:
    """A row per system and number of clients, as `serving.client` tabulates; with pages, energy, rate over time."""
    own = [r for r in records if r["cell"]["kind"] == "server"]
    by = {client.Condition(**r["condition"]): r for r in own}
    loads = {condition: load_of(r) for condition, r in by.items()}
    rows = client.table(loads, {condition: r["quiet"] for condition, r in by.items()})
    for row, (condition, record) in zip(rows, by.items(), strict=True):
        row["rate"] = rates(loads[condition])
        row["pages_gib"] = pages_gib(record.get("pages"), token_gib)
        receipts = [r["receipt"] for r in record["requests"] if r.get("receipt")]
        row["chunk_gib"] = max((r["bytes_loaded"] for r in receipts), default=0) * condition.clients / GIB
        answered = row["requests"] - row["failures"]
        gpu = record.get("gpu")
        row["joules_per_request"] = gpu["energy_j"] / answered if gpu and answered else None
        row["gpu"] = gpu
    return rows


def load_of(record: Record) -> Load:
    """The load of a server's record."""
    names = {f.name for f in fields(Result)}
    results = [Result(**{k: v for k, v in r.items() if k in names}) for r in record["requests"]]
    return Load(results, 0.0, record["seconds"])


def rates(load: Load) -> Row:
    """Requests ended in every whole second of a load, with their mean and standard deviation (figure 13)."""
    whole = int(load.seconds)
    ended = [int(r.finished) for r in load.results if not r.failure]
    series = [ended.count(second) for second in range(whole)]
    known = {"mean": float(np.mean(series)), "deviation": float(np.std(series))} if whole > 1 else {}
    return {"per_second": series, "mean": None, "deviation": None} | known


def pages_gib(pages: Record | None, token_gib: float) -> float | None:
    """Paged KV in use at its largest, on each GPU."""
    if not pages or None in (pages["used"], pages["blocks"], pages["block_tokens"]):
        return None
    return pages["used"] * pages["blocks"] * pages["block_tokens"] * token_gib
