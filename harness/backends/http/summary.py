"""A load in numbers: medians and tails with intervals, failures apart, and whether reuse really happened."""

from collections.abc import Sequence
from typing import Any

from harness.backends.http.load import Load
from harness.backends.http.stream import Outcome
from harness.results import intervals


def summarize_load(load: Load) -> dict[str, Any]:
    """Times in seconds over the answered requests; None where nothing was measured."""
    answered = [o for o in load.outcomes if not o.failure]
    return {
        "requests": len(load.outcomes),
        "failures": len(load.outcomes) - len(answered),
        "seconds": load.seconds,
        "ttft_median": _of(intervals.median, [o.ttft for o in answered]),
        "ttft_p95": _of(intervals.p95, [o.ttft for o in answered]),
        "tpot_median": _of(intervals.median, [o.tpot for o in answered]),
        "request_seconds_median": _of(intervals.median, [o.finished - o.sent for o in answered]),
        "requests_per_second": len(answered) / load.seconds,
        "tokens_per_second": sum(o.tokens for o in answered) / load.seconds,
        **reuse(answered),
    }


def _of(statistic, values: Sequence[float | None]) -> dict[str, Any] | None:
    known = [v for v in values if v is not None]
    return statistic(known) if known else None


def reused_rows(outcome: Outcome) -> int:
    """Rows whose cached KV was used: by the receipt, else what the server's prefix cache held."""
    return outcome.receipt["tokens_reused"] if outcome.receipt else outcome.cached_tokens or 0


def reuse(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Mean rows reused and recomputed, the mean share of row-layers computed, fallbacks by reason."""
    if not outcomes:
        return {"tokens_reused": None, "tokens_recomputed": None, "compute_fraction": None, "fallbacks": {}}
    shares, recomputed, fallbacks = [], [], {}
    for o in outcomes:
        if o.receipt:
            shares.append(o.receipt["compute_fraction"])
            recomputed.append(o.receipt["tokens_recomputed"])
            if reason := o.receipt["fallback"]:
                fallbacks[reason] = fallbacks.get(reason, 0) + 1
        else:
            shares.append(1 - (o.cached_tokens or 0) / o.prompt_tokens if o.prompt_tokens else 1.0)
    n = len(outcomes)
    return {
        "tokens_reused": sum(map(reused_rows, outcomes)) / n,
        "tokens_recomputed": sum(recomputed) / len(recomputed) if recomputed else None,
        "compute_fraction": sum(shares) / n,
        "fallbacks": fallbacks,
    }


def no_speed(load: Load) -> str:
    """Why no speed-up may be reported of a load; empty when every request was answered and reused rows."""
    failed = sum(bool(o.failure) for o in load.outcomes)
    if failed:
        return f"{failed} of {len(load.outcomes)} requests failed"
    idle = sum(reused_rows(o) <= 0 for o in load.outcomes)
    return f"nothing was reused in {idle} of {len(load.outcomes)} requests" if idle else ""
