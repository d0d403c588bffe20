"""Decoding requests beside arriving ones: a table from the records of `harness.experiments.serving.neighbours`.

A gap is the time between two tokens of a neighbour, once all neighbours decode (`lead` tokens). Median, 99th percentile
and maximum are taken over all gaps of all neighbours in a run; of each, the median over undisturbed runs.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from harness.metrics.bootstrap import ratio_of_medians
from harness.results.intervals import as_json, median
from harness.results.undisturbed import pick, together, too_few

NOTHING = "nothing"  # the arm without arrivals
_GAPS = {"median": lambda x: np.quantile(x, 0.5), "p99": lambda x: np.quantile(x, 0.99), "max": max, "mean": np.mean}
_ABOUT = ("store", "tokens", "neighbours", "decode_tokens", "arrivals", "every_s", "system")


def table(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per measured arm; if both are undisturbed, its 99th percentile relative to that of `nothing`."""
    cells = [r for r in records if r["kind"] == "neighbours" and r["runs"] and not r["failed"]]
    alone = next((c for c in cells if c["system"] == NOTHING), None)
    rows = []
    for cell in cells:
        made = row(cell)
        if alone is not None and cell is not alone:
            runs = list(zip(alone["runs"], cell["runs"], strict=False))
            both = [together([a.get("quiet"), b.get("quiet")]) for a, b in runs]
            made["disturbed"] = made["disturbed"] or too_few(both)
            if not made["disturbed"]:
                arm, nothing = ([_gap("p99", pair[i], cell["lead"]) for pair in pick(runs, both)] for i in (1, 0))
                made["p99_over_nothing"] = as_json(ratio_of_medians(arm, nothing))
        rows.append(made)
    return rows


def row(cell: dict[str, Any]) -> dict[str, Any]:
    """Gaps in ms of one arm's neighbours, and the arrivals' TTFT since they were due."""
    quiet = [run.get("quiet") for run in cell["runs"]]
    runs = pick(cell["runs"], quiet)
    made: dict[str, Any] = {name: cell[name] for name in _ABOUT}
    made |= {f"{name}_ms": median([_gap(name, run, cell["lead"]) for run in runs]) for name in _GAPS}
    if all(run["arrivals"] for run in runs):
        waits = [[1e3 * (a["first"] - a["due"]) for a in run["arrivals"]] for run in runs]
        made["arrivals_mean_ttft_ms"] = median([sum(w) / len(w) for w in waits])
        made["arrivals_max_ttft_ms"] = median([max(w) for w in waits])
    return made | {"disturbed": too_few(quiet)}


def _gap(name: str, run: dict[str, Any], lead: int) -> float:
    return float(_GAPS[name]([1e3 * (b - a) for times in run["tokens"] for a, b in pairwise(times[lead - 1 :])]))
