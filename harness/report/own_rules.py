"""This project's own rules beside the verdict on the paper's rule: numbers of the same run, without effect on it.

The paper's rule is `cacheslide`: 26 % of the reused tokens, chosen at the selection layer. Own rules choose
tokens before the request starts, or over two layers (`cacheslide/policies/`).
"""

from harness.report.claims_agents import RIVALS
from harness.report.claims_real import BESIDE, divergences
from harness.report.claims_speed import CONTROL, loaded, longest, mixes
from harness.report.real import row as of_arm
from harness.report.verdicts import NotMeasured, Summary
from harness.report.words import cell, interval, number, points
from harness.results.runs import REFERENCE

RULES = ("cacheslide_mixed", "cacheslide_first", "cacheslide_remember", "cacheslide_overlap", "cacheslide_promote")
ARMS = ("First tokens 10 %", "Remembered 10 %")  # arms of cacheslide_first and cacheslide_remember on the real model
TIMED = {  # claim: the rival of its TTFT ratio
    "fig10-contextcache": CONTROL,
    "fig10-cacheblend-stale": "cacheblend_stale",
    "fig10-cacheblend": "cacheblend",
    "fig10-promptcache": "prompt_cache",
    "headline-latency": REFERENCE,
}


def beside(key: str, summary: Summary) -> str:
    """Numbers of this project's rules on the claim `key`, in the same run; "" where none was measured."""
    parts = []
    if key in TIMED:
        parts += _timed(TIMED[key], summary)
    if key == "headline-throughput":
        parts += _loaded(summary)
    if key.startswith("fig10-"):
        parts += _agents(key.removeprefix("fig10-"), summary)
    if key.startswith("fig11-"):
        parts += _load(key, summary)
    if key == "fig13":
        parts += _series(summary)
    real = summary.get("real")
    if real and key in BESIDE and key.startswith("fig10-"):
        arms = [r for arm in ARMS if (r := of_arm(real, arm)) is not None]
        parts += [divergences(real, arms)] if arms else []
    return "; ".join(parts)


def _timed(rival: str, summary: Summary) -> list[str]:
    """Median TTFT ratios, without intervals, at the length on which the claim is judged, and the loss of F1."""
    try:
        tokens = longest(summary, rival)["tokens"]
    except NotMeasured:
        return []
    times = {r["system"]: r for r in summary["latency"] if r["tokens"] == tokens and r["prompts"]}
    out = []
    for system in RULES:
        losses = mixes(summary, system)
        lost = max((r["loss_points"] for r in losses), key=lambda e: e["value"], default=None)
        parts = [f"{points(lost['value'])} of F1 {interval(lost, _one)}"] if lost else []
        if system in times and rival in times and not times[system].get("disturbed"):
            ratio = times[rival]["ttft_median"]["value"] / times[system]["ttft_median"]["value"]
            parts.insert(0, f"TTFT of {_title(summary, rival)} {number(ratio)}× its own (medians)")
        if parts:
            out.append(f"{_title(summary, system)}: {', '.join(parts)}")
    return out


def _loaded(summary: Summary) -> list[str]:
    try:
        batch = loaded(summary)["batch"]
    except NotMeasured:
        return []
    return [
        f"{r['title']}: {cell(r['qps_ratio'], 2)}× recompute's requests a second at batch {batch}"
        for r in summary["throughput"]
        if r["system"] in RULES and r["batch"] == batch and r["qps_ratio"]
    ]


def _agents(agent: str, summary: Summary) -> list[str]:
    rows = {r["system"]: r for r in summary.get("agents", {}).get("replay") or [] if r["agent"] == agent}
    out = []
    for system in RULES:
        if system not in rows:
            continue
        own = rows[system]
        parts = [f"score {cell(own['score'], 2)}, {points(own['loss_points']['value'])}"] if own["score"] else []
        for rival in RIVALS:
            if rival in rows and not own.get("disturbed"):
                ratio = rows[rival]["ttft_median"]["value"] / own["ttft_median"]["value"]
                parts.append(f"TTFT of {rows[rival]['title']} {number(ratio)}× its own (medians)")
        out.append(f"{own['title']}: {', '.join(parts)}")
    return out


def _load(key: str, summary: Summary) -> list[str]:
    """Ratio of the fastest rival's TTFT to theirs, at the loads of the claim."""
    out = []
    for row in summary.get("agents", {}).get("load") or []:
        systems = {s["system"]: s for s in row["systems"]}
        if not row["advantage"] or not row["mode"].startswith(key.removeprefix("fig11-")):
            continue
        for system in RULES:
            if system in systems and row["best"] in systems:
                ratio = systems[row["best"]]["ttft"]["value"] / systems[system]["ttft"]["value"]
                out.append(f"{systems[system]['title']}: {number(ratio)}× ({row['mode']}, {row['n']}; medians)")
    return out


def _series(summary: Summary) -> list[str]:
    rows = {r["system"]: r for r in summary.get("agents", {}).get("series") or []}
    out = []
    for system in (s for s in RULES if s in rows):
        for rival in (r for r in ("cacheblend", "epic") if r in rows):
            ratio = rows[system]["rate"]["value"] / rows[rival]["rate"]["value"]
            out.append(f"{rows[system]['title']}: {number(ratio)}× {rows[rival]['title']}'s requests a second")
    return out


def _title(summary: Summary, system: str) -> str:
    return summary["titles"].get(system, system)


def _one(x: float) -> str:
    return number(x, 1)
