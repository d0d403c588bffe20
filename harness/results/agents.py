"""Tables of replayed agents: quality and TTFT by agent (fig 10), padding by round (4b), accuracy by turn, heat map.

Records are those of `harness.experiments.agents.replay`. Steps of one episode are correlated, so intervals resample
episodes.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from harness.results import intervals
from harness.results.runs import OURS, REFERENCE, RecordFile
from harness.results.undisturbed import kept, steps_of, too_few

LEAST = 3  # minimum episodes for a turn or a round to be shown
Step = dict[str, Any]


def agents_of(file: RecordFile) -> list[str]:
    """The agents of a file, in the order of its records."""
    return list(dict.fromkeys(r["agent"] for r in file.records))


def systems_of(file: RecordFile) -> list[str]:
    """The variants of a file, in the order of its configuration."""
    return [s for s in file.settings.get("order", ()) if any(s in r["systems"] for r in file.records)]


def by_step(records: Iterable[Step], system: str, value: Callable[[Step], float]) -> tuple[list[float], list[str]]:
    """The value of every step, with its episode."""
    pairs = [(value(s), r["id"]) for r in records for s in r["systems"][system]]
    return [v for v, _ in pairs], [e for _, e in pairs]


def warm(record: Step, system: str) -> list[Step]:
    """The steps after an episode's first one, which finds empty caches."""
    return record["systems"][system][1:]


def gate(records: Sequence[Step], system: str) -> str:
    """Why no speed-up may be reported; empty if every warm step reused rows."""
    steps = [s for r in records for s in warm(r, system)]
    idle = sum(not s["chunks_hit"] for s in steps)
    return "" if steps and not idle else f"nothing was reused in {idle} of {len(steps)} warm steps"


Timed = list[tuple[Step, list[int]]]


def timed(records: Sequence[Step], first: int = 0) -> tuple[Timed, str]:
    """Every episode with its counted steps from `first` on, and why they give no result.

    Counted are the undisturbed steps, or all if those are too few.
    """
    readings = [steps_of(r)[first:] for r in records]
    every = [reading for own in readings for reading in own]
    chosen = iter(kept(every))
    episodes = [
        (r, [k + first for k in range(len(own)) if next(chosen)]) for r, own in zip(records, readings, strict=True)
    ]
    return episodes, too_few(every)


def _ttfts(records: Timed, system: str) -> list[list[float]]:
    """TTFTs of every episode's counted steps; episodes without any are left out."""
    return [[r["systems"][system][k]["ttft_s"] for k in steps] for r, steps in records if steps]


def cost(steps: Sequence[Step], key: str = "row_layers") -> float:
    """Row-layers computed, relative to computing every prompt in full."""
    return sum(s[key] for s in steps) / sum(s["tokens"] * s["layers"] for s in steps)


def _ttft_ratio(records: Timed, top: str, bottom: str) -> dict[str, Any] | None:
    """Median over episodes of the median ratio of TTFTs on the same counted steps."""
    pairs = zip(_ttfts(records, top), _ttfts(records, bottom), strict=True)
    ratios = [float(np.median(np.array(a) / np.array(b))) for a, b in pairs]
    return intervals.median(ratios) if ratios else None


def _own(records: Sequence[Step], system: str) -> list[float] | None:
    scores = [r["own"][system]["score"] for r in records if "own" in r]
    return scores if scores and len(scores) == len(records) else None


def quality_table(file: RecordFile) -> list[dict[str, Any]]:
    """One row per agent and system.

    `right` is the share of recorded turns on which the system makes the recorded call. `score` is the solved share of a
    task when the agent acts on the system's own outputs (None if not run), `success` the share of tasks solved in full;
    `loss_points` is relative to recompute. TTFT is of recorded turns after the first; `ttft_ratio` is TTFT / TTFT of
    recompute on the same turn, `speedup` TTFT / TTFT of CacheSlide, `better` CacheSlide's score over the system's.
    Times are of undisturbed turns; if those are too few, `disturbed` gives the reason and there are no ratios of times.
    """
    out = []
    for agent in agents_of(file):
        records = [r for r in file.records if r["agent"] == agent]
        calm, few = timed(records, first=1)
        for system in systems_of(file):
            steps = [s for r in records for s in warm(r, system)]
            if not steps:
                continue
            right, episodes = by_step(records, system, lambda s: s["right"])
            own, cacheslide, exact = (_own(records, s) for s in (system, OURS, REFERENCE))
            row = {
                "agent": agent,
                "system": system,
                "title": file.settings["titles"][system],
                "episodes": len(records),
                "steps": len(right),
                "tokens": float(np.mean([s["tokens"] for s in steps])),
                "right": intervals.mean(right, episodes),
                "score": None if own is None else intervals.mean(own),
                "success": None
                if own is None
                else intervals.mean([float(r["own"][system]["success"]) for r in records]),
                "loss_points": None if own is None else intervals.points_lost(exact, own),
                "ttft_median": intervals.median([np.median(x) for x in _ttfts(calm, system)]),
                "compute_fraction": cost(steps),
                "disturbed": few,
            }
            reason = "" if system == REFERENCE else gate(records, system)
            reason = reason or few
            both = reason or (OURS not in systems_of(file) and "CacheSlide was not run") or gate(records, OURS)
            row["ratio_reason"] = reason
            row["ttft_ratio"] = None if reason or system == REFERENCE else _ttft_ratio(calm, system, REFERENCE)
            row["speedup"] = None if both or system == OURS else _ttft_ratio(calm, system, OURS)
            known = own is not None and cacheslide is not None
            row["better"] = (
                intervals.ratio_of_sums(cacheslide, own, range(len(own))) if known and system != OURS else None
            )
            out.append(row)
    return out


def windows_table(file: RecordFile) -> dict[str, Any]:
    """F1 of every variant by reasoning round and over all rounds; `updated` are the windows."""
    rows = []
    for system in systems_of(file):
        f1, episodes = by_step(file.records, system, lambda s: s["f1"])
        rounds = []
        longest = max((len(r["systems"][system]) for r in file.records), default=0)
        for k in range(longest):
            own = [r["systems"][system][k]["f1"] for r in file.records if k < len(r["systems"][system])]
            if len(own) >= LEAST:
                rounds.append({"round": k + 1, "f1": intervals.mean(own)})
        title = file.settings["titles"][system]
        rows.append({"system": system, "title": title, "f1": intervals.mean(f1, episodes), "rounds": rounds})
    tokens = [s["tokens"] for r in file.records for s in r["systems"].get(REFERENCE, [])]
    return {
        "rows": rows,
        "windows": file.settings.get("windows", []),
        "tokens": float(np.mean(tokens)) if tokens else None,
        "episodes": len(file.records),
    }


def turns_table(file: RecordFile, late: int = 12) -> list[dict[str, Any]]:
    """One row per agent and variant: right calls by turn, turns from `late` on, and costs of serving and storing.

    `prefill` and `encode` are row-layers relative to computing every prompt in full; `loss_points` is relative to
    recompute over the late turns.
    """
    out = []
    for agent in agents_of(file):
        records = [r for r in file.records if r["agent"] == agent]
        for system in systems_of(file):
            turns = []
            for k in range(max(len(r["systems"][system]) for r in records)):
                own = [r["systems"][system][k]["right"] for r in records if k < len(r["systems"][system])]
                if len(own) >= min(LEAST, len(records)):
                    turns.append({"turn": k + 1, "right": intervals.mean(own), "episodes": len(own)})
            pairs = [
                (s["right"], base["right"], r["id"])
                for r in records
                for s, base in list(zip(r["systems"][system], r["systems"][REFERENCE], strict=True))[late - 1 :]
            ]
            steps = [s for r in records for s in r["systems"][system]]
            values, base, episodes = zip(*pairs, strict=True) if pairs else ((), (), ())
            out.append(
                {
                    "agent": agent,
                    "system": system,
                    "title": file.settings["titles"][system],
                    "turns": turns,
                    "late": intervals.mean(values, episodes) if pairs else None,
                    "loss_points": intervals.points_lost(base, values, episodes) if pairs else None,
                    "prefill": cost(steps),
                    "encode": cost(steps, "build_row_layers"),
                    "generation": max(s["generation"] for s in steps),
                    "late_from": late,
                }
            )
    return out


def grid_table(file: RecordFile) -> dict[str, Any]:
    """Correct calls per second of every cell (recompute ratio, τ): right calls over the seconds of all calls.

    Of undisturbed turns, or of all, with the reason in `disturbed`, if those are too few.
    """
    cells = []
    calm, few = timed(file.records)
    for system in systems_of(file):
        ratio, tau = map(float, system.split("@"))
        right, _ = by_step(file.records, system, lambda s: s["right"])
        steps = [(r["systems"][system][k], r["id"]) for r, indices in calm for k in indices]
        qps = intervals.ratio_of_sums(
            [s["right"] for s, _ in steps], [s["total_s"] for s, _ in steps], [episode for _, episode in steps]
        )
        cells.append({"recompute_ratio": ratio, "tau": tau, "qps": qps, "right": float(np.mean(right))})
    settings = {k: file.settings.get(k) for k in ("recompute_ratios", "taus", "every")}
    return {"cells": cells, "episodes": len(file.records), "disturbed": few, **settings}
