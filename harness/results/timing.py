"""Latency and throughput tables. A speed-up needs proof of reuse, and answers, from the same run.

Disturbed rounds and slices are left out; if too few are left, `disturbed` gives the reason and there is no ratio.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from harness.results import intervals
from harness.results.runs import OURS, REFERENCE, RecordFile, Run
from harness.results.tables import receipt_totals
from harness.results.undisturbed import kept, rounds_of, slices_of, together, too_few

NOT_COMPARED = "the reference of the comparison"


def gate(samples: Sequence[Mapping[str, Any]]) -> str:
    """Why no speed-up may be reported for a system's timed requests; empty if it may.

    Every request must have reused rows and every request's answers must have been scored in the same run.
    """
    if not samples:
        return "not timed"
    idle = sum(s["receipt"]["tokens_reused"] <= 0 for s in samples)
    if idle:
        return f"nothing was reused in {idle} of {len(samples)} timed requests"
    unscored = sum(not s.get("questions") for s in samples)
    if unscored:
        return f"no answers were scored for {unscored} of {len(samples)} timed requests"
    return ""


def latency_table(run: Run) -> list[dict[str, Any]]:
    """One row per prompt length and system. A prompt's repeats are reduced to their median first.

    `ttft_ratio` is the median over prompts of TTFT / TTFT of recompute on the same prompt; `compute_fraction` is the
    ratio if only the active rows of each layer cost time, and `efficiency` how close the measured ratio is to it.
    """
    rows = []
    for tokens, file in run.latency.items():
        systems = run.order(name for r in file.records for name in r["systems"])
        rows += [_latency_row(run, tokens, file, system) for system in systems]
    return rows


def latency_ratios(run: Run) -> list[dict[str, Any]]:
    """Each other system's TTFT over CacheSlide's, by prompt length (median over prompts)."""
    out = []
    for tokens, file in run.latency.items():
        cacheslide = _samples(file, OURS)
        for system in run.order(name for r in file.records for name in r["systems"] if name != OURS):
            other = _samples(file, system)
            both = [key for key in cacheslide if key in other]
            reason = gate([cacheslide[key] for key in both])
            if not reason and system != REFERENCE:
                reason = gate([other[key] for key in both])
                reason = reason and f"{system}: {reason}"
            times, few = _times(file, both, system, OURS)
            reason = reason or few
            ratio = None if reason else intervals.median([a / b for a, b in times.values()])
            out.append(
                {"tokens": tokens, "system": system, "speedup": ratio, "speedup_reason": reason, "disturbed": few}
            )
    return out


def _samples(file: RecordFile, system: str) -> dict[str, dict[str, Any]]:
    return {r["id"]: r["systems"][system] for r in file.records if r["systems"].get(system, {}).get("ttft_seconds")}


def _times(file: RecordFile, keys: Sequence[str], *systems: str) -> tuple[dict[str, list[float]], str]:
    """Median TTFT of each system by prompt over the same rounds, and why they cannot be compared.

    Rounds undisturbed for all the systems; prompts without one are left out. If too few rounds are undisturbed, all are
    taken, and the second value gives the reason.
    """
    records = {r["id"]: r for r in file.records if r["id"] in set(keys)}
    rounds = {key: rounds_of(records[key], *systems) for key in keys}
    every = [reading for own in rounds.values() for reading in own]
    few, chosen = too_few(every), iter(kept(every))
    out = {}
    for key, own in rounds.items():
        take = [next(chosen) for _ in own]
        samples = [np.array(records[key]["systems"][s]["ttft_seconds"]) for s in systems]
        if any(take):
            out[key] = [float(np.median(s[take])) for s in samples]
    return out, few


def _latency_row(run: Run, tokens: int, file: RecordFile, system: str) -> dict[str, Any]:
    own, reference = _samples(file, system), _samples(file, REFERENCE)
    row = {"tokens": tokens, "system": system, "title": run.titles.get(system, system), "prompts": len(own)}
    if not own:
        return row | {"ttft_ratio": None, "ratio_reason": "not timed", "disturbed": ""}
    times, few = _times(file, list(own), system)
    seconds = [one for one, *_ in times.values()]
    row |= {
        "prompt_tokens": float(np.mean([r["tokens"] for r in file.records if r["id"] in own])),
        "repeats": min(len(s["ttft_seconds"]) for s in own.values()),
        "warmups": file.settings.get("warmups", run.config.get("latency", {}).get("warmups")),
        "ttft_median": intervals.median(seconds),
        "ttft_p95": intervals.p95(seconds),
        **receipt_totals([s["receipt"] for s in own.values()]),
    }
    scored = [(key, q["f1"]) for key, s in own.items() for q in s.get("questions", [])]
    row["f1"] = intervals.mean([f1 for _, f1 in scored], [key for key, _ in scored]) if scored else None
    both = [key for key in own if key in reference]
    reason = NOT_COMPARED if system == REFERENCE else gate([own[key] for key in both])
    if not reason and len(both) < len(own):
        reason = f"recompute was timed on {len(both)} of {len(own)} prompts"
    pairs, apart = _times(file, both, system, REFERENCE)
    few = few or apart
    if few and (not reason or reason == NOT_COMPARED):
        reason = few
    ratio = None if reason else intervals.median([a / b for a, b in pairs.values()])
    row |= {"ttft_ratio": ratio, "ratio_reason": reason, "disturbed": few}
    row["efficiency"] = row["compute_fraction"] / ratio["value"] if ratio else None
    return row


def throughput_table(run: Run) -> list[dict[str, Any]]:
    """One row per system and batch size; intervals resample the rounds of the closed loop.

    Only rounds undisturbed for the system and, if it ran, for recompute.
    """
    if run.throughput is None:
        return []
    by_key = {(r["system"], r["batch"]): r for r in run.throughput.records}
    rows = []
    for system in run.order(s for s, _ in by_key):
        for batch in sorted(b for s, b in by_key if s == system):
            record, reference = by_key[system, batch], by_key.get((REFERENCE, batch))
            rows.append(_throughput_row(run, record, reference))
    return rows


def _throughput_row(run: Run, record: Mapping[str, Any], reference: Mapping[str, Any] | None) -> dict[str, Any]:
    take, few = _kept_requests(record, reference)
    requests, seconds, rounds = (
        [x for x, ok in zip(of, take, strict=True) if ok]
        for of in (record["requests"], round_seconds(record), _rounds(record))
    )
    correct = [r["question"]["success"] for r in requests]
    ones = [1.0] * len(requests)
    ttft = [r["ttft_seconds"] for r in requests]
    row = {
        "system": record["system"],
        "title": run.titles.get(record["system"], record["system"]),
        "batch": record["batch"],
        "requests": len(requests),
        "rounds": len(set(rounds)),
        "qps": intervals.ratio_of_sums(ones, seconds, rounds),
        "qps_correct": intervals.ratio_of_sums(correct, seconds, rounds),
        "success": float(np.mean(correct)),
        "ttft_median": float(np.median(ttft)),
        "ttft_p95": float(np.quantile(ttft, 0.95)),
        "compute_fraction": record["compute_fraction"],
    }
    reason = _throughput_gate(record, reference)
    if few and (not reason or reason == NOT_COMPARED):
        reason = few
    ratio = None
    if not reason:
        base = [x for x, ok in zip(round_seconds(reference), take, strict=True) if ok]
        ratio = intervals.ratio_of_sums(base, seconds, rounds)
    return row | {"qps_ratio": ratio, "ratio_reason": reason, "disturbed": few}


def _kept_requests(record: Mapping[str, Any], reference: Mapping[str, Any] | None) -> tuple[list[bool], str]:
    """Which requests count, by slice, and why the loop cannot be compared."""
    sizes, readings = slices_of(record)
    if reference is not None and slices_of(reference)[0] == sizes:
        readings = [together(pair) for pair in zip(readings, slices_of(reference)[1], strict=True)]
    take = [ok for ok, size in zip(kept(readings), sizes, strict=True) for _ in range(size)]
    return take, too_few(readings)


def _throughput_gate(record: Mapping[str, Any], reference: Mapping[str, Any] | None) -> str:
    if record["system"] == REFERENCE:
        return NOT_COMPARED
    if reference is None:
        return "recompute was not run at this batch size"
    if len(reference["requests"]) != len(record["requests"]):
        return "recompute answered another number of requests"
    counted = [r["tokens_reused"] for r in record["requests"] if "tokens_reused" in r]
    idle = sum(n <= 0 for n in counted)
    if idle:
        return f"nothing was reused in {idle} of {len(counted)} requests"
    if not counted and record["compute_fraction"] >= 1.0:
        return "nothing was reused: every row of every layer was computed"
    return ""


def _rounds(record: Mapping[str, Any]) -> list[int]:
    """The round of every request: the loop serves `batch` requests at a time, in order."""
    return [i // record["batch"] for i in range(len(record["requests"]))]


def round_seconds(record: Mapping[str, Any]) -> list[float]:
    """Every request's part of its round's time; the sum is the time of the whole loop."""
    rounds = _rounds(record)
    ends = [0.0] * (max(rounds) + 1)
    for i, r in zip(rounds, record["requests"], strict=True):
        ends[i] = max(ends[i], r["finished_seconds"])
    lengths = np.diff([0.0, *ends])
    sizes = np.bincount(rounds)
    return [float(lengths[i] / sizes[i]) for i in rounds]
