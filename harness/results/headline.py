"""The headline numbers of a run. Each is a plain number, or None with the reason beside it."""

from typing import Any

from harness.results.runs import NAIVE, OURS, REFERENCE
from harness.results.tables import SHARE_TOLERANCE
from harness.systems import COPE

KEYS = (
    "recompute_f1",
    "naive_reuse_loss_points",
    "cacheslide_loss_points",
    "best_policy_loss_points",
    "best_policy_row_share",
    "cpu_ttft_ratio_4k",
    "ideal_ratio_4k",
)
SHARE = 0.26  # of the reused rows
TIE_POINTS = 0.5
LENGTH = 4096

Row = dict[str, Any]


class _Missing(Exception):
    """Reason why a headline number is missing."""


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """`headline`, `headline_missing` (reasons) and `headline_notes` (mix, n, interval) from a summary's tables."""
    out: dict[str, Any] = {
        "headline": dict.fromkeys(KEYS),
        "headline_missing": {},
        "headline_notes": {},
    }
    groups = (
        (("recompute_f1",), _recompute_f1),
        (("naive_reuse_loss_points",), _naive_loss),
        (("cacheslide_loss_points",), _cacheslide_loss),
        (("best_policy_loss_points", "best_policy_row_share"), _best_policy),
        (("cpu_ttft_ratio_4k",), _ttft_ratio),
        (("ideal_ratio_4k",), _ideal),
    )
    for keys, rule in groups:
        try:
            numbers = rule(summary)
        except _Missing as reason:
            out["headline_missing"] |= dict.fromkeys(keys, str(reason))
            continue
        for key, (value, note) in zip(keys, numbers, strict=True):
            out["headline"][key], out["headline_notes"][key] = value, note
    return out


def _mixes(rows: list[Row], system: str) -> list[Row]:
    """The system's rows by mix, for scored answers; every request must have reused rows."""
    mixes = [r for r in rows if r["scope"] == "mix" and r["system"] == system and r["questions"]]
    if not mixes:
        raise _Missing(f"{system} has no accuracy records in this run")
    every = {r["name"] for r in rows if r["scope"] == "mix"}
    lacking = sorted(every - {r["name"] for r in mixes})
    if lacking:
        raise _Missing(f"{system} has no accuracy records for {', '.join(lacking)}")
    for row in mixes:
        if system != REFERENCE and row["requests_without_reuse"]:
            idle = f"{row['requests_without_reuse']} of {row['prompts']} prompts of {row['name']}"
            raise _Missing(f"{system} reused nothing in {idle}")
        if row["loss_points"] is None:
            raise _Missing("recompute has no accuracy records in this run, so no loss can be given")
    return mixes


def _note(row: Row, estimate: dict[str, Any], about: str) -> dict[str, Any]:
    timed = "scope" not in row
    where = {"system": row["system"], "mix": None if timed else row["name"], "tokens": row["tokens"] if timed else None}
    return where | {key: estimate[key] for key in ("n", "values", "low", "high")} | {"about": about}


def _recompute_f1(summary: Row):
    row = min(_mixes(summary["accuracy"], REFERENCE), key=lambda r: r["f1"]["value"])
    return [(row["f1"]["value"], _note(row, row["f1"], "mean F1 over all questions of the worse mix"))]


def _naive_loss(summary: Row):
    row = min(_mixes(summary["accuracy"], NAIVE), key=lambda r: r["loss_points"]["value"])
    loss = row["loss_points"]
    return [(loss["value"], _note(row, loss, "recompute minus it, in points of F1, on the mix that loses less"))]


def _cacheslide_loss(summary: Row):
    row = max(_mixes(summary["accuracy"], OURS), key=lambda r: r["loss_points"]["value"])
    share = row["recomputed_share"]
    if abs(share - SHARE) > SHARE_TOLERANCE:
        raise _Missing(f"cacheslide recomputed {share:.1%} of the reused rows in this run, not {SHARE:.0%}")
    about = f"recompute minus it, in points of F1, on the mix that loses more, at {share:.3f} of the reused rows"
    return [(row["loss_points"]["value"], _note(row, row["loss_points"], about))]


def _best_policy(summary: Row):
    candidates, reasons = [], []
    rows = summary.get("accuracy") or []
    for system in sorted({r["system"] for r in rows if family(r["system"])}):
        try:
            mixes = _mixes(rows, system)
        except _Missing as reason:
            reasons.append(str(reason))
            continue
        worst = max(mixes, key=lambda r: r["loss_points"]["value"])
        weight = sum(r["prompts"] for r in mixes)
        share = sum(r["compute_fraction"] * r["prompts"] for r in mixes) / weight
        candidates.append((worst, share, weight))
    if not candidates:
        raise _Missing("; ".join(reasons) or "no CacheSlide policy was run")
    best = min(worst["loss_points"]["value"] for worst, _, _ in candidates)
    tied = [c for c in candidates if c[0]["loss_points"]["value"] <= best + TIE_POINTS]
    worst, share, prompts = min(tied, key=lambda c: (c[1], c[0]["system"]))
    loss, count = worst["loss_points"], len(candidates)
    about = (
        f"smallest loss on its worse mix among {count} CacheSlide policies; of those within {TIE_POINTS} points of it, "
        "the one that computes the smallest share of row-layers"
    )
    every = {"n": prompts, "values": prompts, "low": None, "high": None}
    return [
        (loss["value"], _note(worst, loss, about)),
        (share, _note(worst, every, "share of row-layers that policy computes, over all prompts") | {"mix": None}),
    ]


def family(system: str) -> bool:
    """Whether `system` is CacheSlide or a variant of it on the same model (cacheslide_promote, cacheslide@3)."""
    return system == OURS or (system.startswith((f"{OURS}_", f"{OURS}@")) and not system.endswith(COPE))


def _at_4k(summary: Row) -> Row:
    latency = [r for r in summary["latency"] if r["tokens"] == LENGTH and r["system"] == OURS]
    if not latency:
        raise _Missing(f"cacheslide was not timed at {LENGTH} tokens in this run")
    return latency[0]


def _ttft_ratio(summary: Row):
    device = summary["conditions"].get("device")
    if device != "cpu":
        raise _Missing(f"this run's device is {device}, not cpu; its ratio stands in the latency table")
    row = _at_4k(summary)
    if row["ttft_ratio"] is None:
        raise _Missing(row["ratio_reason"])
    ratio = row["ttft_ratio"]
    return [(ratio["value"], _note(row, ratio, "median over prompts of TTFT / TTFT of recompute"))]


def _ideal(summary: Row):
    row = _at_4k(summary)
    if not row["prompts"]:
        raise _Missing(row["ratio_reason"])
    estimate = {"n": row["prompts"], "values": row["prompts"], "low": None, "high": None}
    return [(row["compute_fraction"], _note(row, estimate, "mean share of row-layers computed in the timed requests"))]
