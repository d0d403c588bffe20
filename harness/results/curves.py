"""Tables without comparisons of answers: CKSim by shift, prompt statistics, the sweep of selection layers."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from harness.results import intervals
from harness.results.runs import Run

WHY = ("position", "context", "chain")
HOW = ("stale", "delta", "cope", "ccpe")


def cksim_table(run: Run) -> list[dict[str, Any]]:
    """One row per shift: CKSim of each kind over layers and prompts, and per layer over prompts."""
    return [] if run.cksim is None else cksim_rows(run.cksim.records)


def cope_table(run: Run) -> list[dict[str, Any]]:
    """`cksim_table` of the CoPE model, and of both in the chain of fixed chunks."""
    return [] if run.cksim_cope is None else cksim_rows(run.cksim_cope.records)


def cksim_rows(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """`cksim_table` from records, shared by figure and summary. A kind is "why_how", of `WHY` and `HOW`."""
    by_shift: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        by_shift.setdefault(record["shift"], []).append(record)
    rows = []
    for shift, group in sorted(by_shift.items()):
        row: dict[str, Any] = {"shift": shift, "prompts": len(group), "tokens": _mean(r["tokens"] for r in group)}
        for kind in (k for why in WHY for how in HOW if (k := f"{why}_{how}") in group[0]["cksim"]):
            layers = np.array([r["cksim"][kind] for r in group])
            row[kind] = intervals.mean(layers.mean(axis=1)) | {"layers": layers.mean(axis=0).tolist()}
        rows.append(row)
    return rows


def prompts_table(run: Run) -> list[dict[str, Any]]:
    """One row per data set: reusable share with its spread, and shifts of fixed segments."""
    rows = []
    for dataset, content in (run.prompts or {}).get("datasets", {}).items():
        shares, moves = content["reusable_share"], content["moves"]
        moved = [abs(m["displacement"]) for m in moves]
        systems = run.order(s for m in moves for s in m["shift"])
        rows.append(
            {
                "dataset": dataset,
                "prompts": len(shares),
                "reusable_share": _spread(shares),
                "displacement": _spread(moved) if moved else None,
                "unmoved": sum(d == 0 for d in moved),
                "shift": {s: _spread([m["shift"][s] for m in moves if s in m["shift"]]) for s in systems},
            }
        )
    return rows


def moves_table(run: Run) -> list[dict[str, Any]]:
    """One row per data set: the shift of position indices on the CoPE model, by variant, in positions."""
    rows = []
    for dataset, content in (run.prompts_cope or {}).get("datasets", {}).items():
        moves = content["moves"]
        row = {"dataset": dataset, "prompts": len(moves)}
        row["displacement"] = intervals.mean([abs(m["displacement"]) for m in moves])
        for field in ("shift", "unsaturated"):
            row[field] = {v: intervals.mean([m[field][v] for m in moves]) for v in moves[0][field]}
        rows.append(row)
    return rows


def agent_prompts_table(run: Run) -> list[dict[str, Any]]:
    """One row per agent: reusable share and length of the prompts of its recorded episodes."""
    return [
        {
            "agent": agent,
            "episodes": content["episodes"],
            "prompts": len(content["reusable_share"]),
            "reusable_share": _spread(content["reusable_share"]),
            "tokens": _spread(content["tokens"]),
        }
        for agent, content in (run.prompts or {}).get("agents", {}).items()
    ]


def layer_sweep(run: Run) -> dict[str, Any] | None:
    """The sweep that chose the selection layer: F1 by system, layer and data set on validation data."""
    if run.layer is None:
        return None
    rows: dict[tuple[str, int | None], dict[str, Any]] = {}
    for dataset, arms in run.layer.get("f1", {}).items():
        for arm, f1 in arms.items():
            system, _, layer = arm.partition("@")
            key = system, int(layer) if layer else None
            rows.setdefault(key, {"system": system, "layer": key[1], "f1": {}})["f1"][dataset] = f1
    for row in rows.values():
        row["worst"] = min(row["f1"].values())
    order = {s: i for i, s in enumerate(run.order(s for s, _ in rows))}
    ordered = sorted(rows.values(), key=lambda r: (order[r["system"]], -1 if r["layer"] is None else r["layer"]))
    return {key: run.layer.get(key) for key in ("layer", "recompute_ratio", "margin")} | {"rows": ordered}


def _spread(values: list[float]) -> dict[str, float]:
    sample = np.array(values, dtype=float)
    sd = float(sample.std(ddof=1)) if len(sample) > 1 else 0.0
    return {"mean": float(sample.mean()), "sd": sd, "min": float(sample.min()), "max": float(sample.max())}


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
