"""Tables of agents under load: TTFT and throughput by agents and beams (fig 11), throughput over time (fig 13)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from harness.load.measures import Done, series, span
from harness.results import intervals
from harness.results.intervals import LEVEL
from harness.results.runs import OURS, REFERENCE, RecordFile
from harness.results.undisturbed import cells_of, kept, together, too_few

VARIANTS = (OURS, "cacheslide_first_turn", "cacheslide_promote", "naive_reuse", REFERENCE)  # without rivals
RESAMPLES = 2000


def done_of(rows: Sequence[Sequence[float]]) -> list[Done]:
    """A system's requests, from [start, TTFT, end, correct]."""
    return [Done(start, start, end, bool(right), ttft) for start, ttft, end, right in rows]


def quiet_records(records: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The records without disturbed systems (all if those are too few), and why they give no result."""
    readings = [together(cells_of(r)) for r in records]
    return [r for r, ok in zip(records, kept(readings), strict=True) if ok], too_few(readings)


def load_table(file: RecordFile) -> list[dict[str, Any]]:
    """One row per mode and number. TTFT and rates are per repeat; intervals resample repeats.

    `best` is the rival with the lowest TTFT, `advantage` its TTFT over CacheSlide's; None, with the reason in
    `disturbed`, if too few repeats were undisturbed.
    """
    out = []
    for mode, n in dict.fromkeys((r["mode"], r["n"]) for r in file.records):
        own, few = quiet_records([r for r in file.records if (r["mode"], r["n"]) == (mode, n)])
        systems = [s for s in file.settings["order"] if all(s in r["systems"] for r in own)]
        rows, ttft = [], {}
        for system in systems:
            runs = [done_of(r["systems"][system]) for r in own]
            ttft[system] = [float(np.median([d.ttft_s for d in run])) for run in runs]
            seconds, each = [span(run) for run in runs], range(len(runs))
            rows.append(
                {
                    "system": system,
                    "title": file.settings["titles"][system],
                    "requests": sum(map(len, runs)),
                    "ttft": intervals.median(ttft[system]),
                    "qps": intervals.ratio_of_sums([len(run) for run in runs], seconds, each),
                    "qps_correct": intervals.ratio_of_sums(
                        [sum(d.correct for d in run) for run in runs], seconds, each
                    ),
                }
            )
        rivals = {s: float(np.median(t)) for s, t in ttft.items() if s not in VARIANTS}
        best = min(rivals, key=rivals.get) if rivals and OURS in ttft else None
        ratio = None
        if best is not None and not few:
            ratio = intervals.median([a / b for a, b in zip(ttft[best], ttft[OURS], strict=True)])
        row = {"mode": mode, "n": n, "repeats": len(own), "systems": rows, "best": best, "advantage": ratio}
        out.append(row | {"disturbed": few})
    return out


def bins_of(rows: Sequence[Sequence[float]]) -> list[float]:
    """Completions in every full second, without the last one, in which agents run out of work."""
    bins = series(done_of(rows))
    return bins[:-1] if len(bins) > 1 else bins


def series_table(file: RecordFile) -> list[dict[str, Any]]:
    """One row per system: requests completed in every second, mean rate and σ, and both relative to CacheSlide's.

    `rate_ratio` is CacheSlide's rate over the system's, `std_ratio` CacheSlide's σ over the system's; both resample
    slices in pairs. Both are None, with the reason in `disturbed`, if too few slices were undisturbed.
    """
    systems = [s for s in file.settings["order"] if all(s in r["systems"] for r in file.records)]
    records, few = quiet_records(file.records)
    each = range(len(records))
    counts = {s: [len(r["systems"][s]) for r in records] for s in systems}
    seconds = {s: [span(done_of(r["systems"][s])) for r in records] for s in systems}
    bins = {s: [bins_of(r["systems"][s]) for r in records] for s in systems}
    out = []
    for s in systems:
        row = {
            "system": s,
            "title": file.settings["titles"][s],
            "slices": bins[s],
            "rate": intervals.ratio_of_sums(counts[s], seconds[s], each),
            "std": float(np.std(np.concatenate(bins[s]))),
            "concurrent": file.records[0]["n"],
            "disturbed": few,
        }
        pair = OURS in systems and s != OURS and not few
        row["rate_ratio"] = intervals.ratio_of_sums(seconds[s], seconds[OURS], each) if pair else None
        row["std_ratio"] = _std_ratio(bins[OURS], bins[s]) if pair else None
        out.append(row)
    return out


def _std_ratio(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], seed: int = 0) -> dict[str, Any] | None:
    """σ of all bins of `a` over σ of all bins of `b`, resampling slices; None if `b` does not vary."""

    def ratio(index: Sequence[int]) -> float | None:
        below = float(np.std(np.concatenate([b[i] for i in index])))
        return float(np.std(np.concatenate([a[i] for i in index]))) / below if below else None

    value = ratio(range(len(a)))
    if value is None:
        return None
    rng = np.random.default_rng(seed)
    draws = [ratio(rng.integers(0, len(a), len(a))) for _ in range(RESAMPLES)] if len(a) > 1 else [None]
    out = {"value": value, "low": None, "high": None, "n": len(a), "values": sum(map(len, a))}
    if None in draws:
        return out
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return out | {"low": float(low), "high": float(high)}
