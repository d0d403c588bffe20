"""Statistics of a load: medians and tails with intervals, failures, and whether reuse really happened."""

from collections.abc import Sequence
from typing import Any

from harness.backends.client import Result
from harness.backends.http.load import Load
from harness.results import intervals


def summarize_load(load: Load) -> dict[str, Any]:
    """Statistics in seconds over answered requests; None where nothing was measured."""
    answered = [r for r in load.results if not r.failure]
    return {
        "requests": len(load.results),
        "failures": len(load.results) - len(answered),
        "seconds": load.seconds,
        "ttft_mean": _of(intervals.mean, [r.ttft for r in answered]),
        "ttft_median": _of(intervals.median, [r.ttft for r in answered]),
        "ttft_p95": _of(intervals.p95, [r.ttft for r in answered]),
        "ttft_p99": _of(intervals.p99, [r.ttft for r in answered]),
        "tpot_mean": _of(intervals.mean, [r.tpot for r in answered]),
        "tpot_median": _of(intervals.median, [r.tpot for r in answered]),
        "request_seconds_median": _of(intervals.median, [r.seconds for r in answered]),
        "requests_per_second": len(answered) / load.seconds,
        "tokens_per_second": sum(r.tokens for r in answered) / load.seconds,
        **reuse(answered),
    }


def _of(statistic, values: Sequence[float | None]) -> dict[str, Any] | None:
    known = [v for v in values if v is not None]
    return statistic(known) if known else None


def reused_rows(result: Result) -> int:
    """Rows whose cached KV was used: by the receipt, else by the server's prefix cache."""
    return result.receipt["tokens_reused"] if result.receipt else result.cached_tokens or 0


def reuse(results: Sequence[Result]) -> dict[str, Any]:
    """Mean rows reused and recomputed, the mean share of row-layers computed, fallbacks by reason."""
    if not results:
        return {"tokens_reused": None, "tokens_recomputed": None, "compute_fraction": None, "fallbacks": {}}
    shares, recomputed, fallbacks = [], [], {}
    for r in results:
        if r.receipt:
            shares.append(r.receipt["compute_fraction"])
            recomputed.append(r.receipt["tokens_recomputed"])
            if reason := r.receipt["fallback"]:
                fallbacks[reason] = fallbacks.get(reason, 0) + 1
        else:
            shares.append(1 - (r.cached_tokens or 0) / r.prompt_tokens if r.prompt_tokens else 1.0)
    n = len(results)
    return {
        "tokens_reused": sum(map(reused_rows, results)) / n,
        "tokens_recomputed": sum(recomputed) / len(recomputed) if recomputed else None,
        "compute_fraction": sum(shares) / n,
        "fallbacks": fallbacks,
    }


def no_speed(load: Load) -> str:
    """Why no speed-up may be reported for a load; empty if every request was answered and reused rows."""
    failed = sum(bool(r.failure) for r in load.results)
    if failed:
        return f"{failed} of {len(load.results)} requests failed"
    idle = sum(reused_rows(r) <= 0 for r in load.results)
    return f"nothing was reused in {idle} of {len(load.results)} requests" if idle else ""
