"""Rules for the claims about time and answers together (figure 10, the abstract's numbers), on the study's records.

CacheSlide is the paper's rule here: 26 % of the reused tokens, those that deviate most at the selection layer. This
project's own rules have a separate column (`own_rules.py`) and change no verdict.
"""

from collections.abc import Callable
from typing import Any

from harness.report.verdicts import (
    LEAST,
    Estimate,
    Finding,
    NotJudged,
    NotMeasured,
    Summary,
    as_in_the_paper,
    at_most,
    calm,
    grade,
    joined,
    raced,
)
from harness.report.words import interval, number, points, prompts
from harness.results.runs import OURS, REFERENCE

CONTROL = "context_cache"  # reuses the system prompt only: its gain is the resolution of the measurement
MOST_POINTS = 3.0  # of F1: a negligible loss in this study


def longest(summary: Summary, other: str) -> dict[str, Any]:
    """The row of `other` at the longest length timed for both it and CacheSlide."""
    rows = [r for r in summary["latency_ratios"] if r["system"] == other]
    if not rows:
        raise NotMeasured(f"{OURS} and {other} were not timed together in this run")
    return max(rows, key=lambda r: r["tokens"])


def _speedup(summary: Summary, other: str) -> tuple[Estimate, str]:
    """CacheSlide's TTFT advantage over `other` at the longest timed length, and its wording."""
    row = longest(summary, other)
    calm(row)
    if row["speedup"] is None:
        raise NotMeasured(f"no speed-up may be reported: {row['speedup_reason']}")
    for timed in summary["latency"]:
        if (timed["system"], timed["tokens"]) == (OURS, row["tokens"]):
            as_in_the_paper(timed)
    e = row["speedup"]
    name = summary["titles"].get(other, other)
    value = f"{number(e['value'])}× at {row['tokens']:,} tokens {interval(e)}"
    return e, f"TTFT of {name} over CacheSlide's: {value}, {prompts(e)}"


def mixes(summary: Summary, system: str) -> list[dict[str, Any]]:
    """The system's accuracy rows by mix that have a loss against recompute."""
    return [r for r in summary["accuracy"] if r["scope"] == "mix" and r["system"] == system and r.get("loss_points")]


def worst_loss(summary: Summary, system: str, why: str) -> dict[str, Any]:
    """The row of the mix with the system's largest loss; NotMeasured with `why` without one."""
    rows = mixes(summary, system)
    if not rows:
        raise NotMeasured(why)
    return max(rows, key=lambda r: r["loss_points"]["value"])


def against_exact(summary: Summary) -> Finding:
    """Fig. 10 against ContextCache: faster, and a loss of at most 3 points on the worse mix."""
    speed, text = _speedup(summary, "context_cache")
    row = worst_loss(summary, OURS, "CacheSlide's accuracy was not measured against recompute")
    as_in_the_paper(row)
    loss = row["loss_points"]
    shown = interval(loss, lambda x: number(x, 1))
    lost = f"CacheSlide {points(loss['value'])} of F1 to recompute on the {row['name']} mix {shown}, {prompts(loss)}"
    verdict = raced([speed], [grade(speed, 2.4), at_most(loss, MOST_POINTS)])
    return Finding(verdict, f"{text}; {lost}")


def against_approximate(other: str, faster: float, better: float, twin: str = "") -> Callable[[Summary], Finding]:
    """Fig. 10 against an approximate baseline: `faster` times as fast, `better` times its F1 on the worse mix.

    `twin` replaces `other` where that was not timed: a variant that does the same work or more.
    """

    def rule(summary: Summary) -> Finding:
        timed = {r["system"] for r in summary["latency_ratios"]}
        speed, text = _speedup(summary, twin if other not in timed and twin in timed else other)
        rows = [r for r in summary["accuracy_ratios"] if r["system"] == other and r["f1_ratio"]["value"] is not None]
        if not rows:
            raise NotMeasured(f"accuracy of CacheSlide over {other} was not measured")
        for row in mixes(summary, OURS):
            as_in_the_paper(row)
        least = min(rows, key=lambda r: r["f1_ratio"]["value"])
        e = least["f1_ratio"]
        f1 = f"CacheSlide's F1 over its: {number(e['value'])}× on the {least['mix']} mix {interval(e)}, {prompts(e)}"
        return Finding(raced([speed], [grade(speed, faster), grade(e, better)]), f"{text}; {f1}")

    return rule


def headline_latency(summary: Summary) -> Finding:
    """Against recompute, the slowest system and so the most favourable comparison."""
    speed, text = _speedup(summary, REFERENCE)
    ideal = [r["compute_fraction"] for r in summary["latency"] if r["system"] == OURS and r["prompts"]][-1]
    bound = f"{number(1 / ideal)}× if computing its rows were all that costs time"
    return Finding(joined(grade(speed, 3.11)), f"{text}; {bound}")


def loaded(summary: Summary) -> dict[str, Any]:
    """CacheSlide's row of the throughput table at the largest batch that was served in at least `LEAST` rounds."""
    rows = [r for r in summary["throughput"] if r["system"] == OURS]
    if not rows:
        raise NotMeasured("CacheSlide's throughput was not measured in this run")
    if all(r["rounds"] < LEAST for r in rows):
        most = max(r["rounds"] for r in rows)
        raise NotJudged(f"no batch was served in {LEAST} rounds or more (at most {most})")
    return max((r for r in rows if r["rounds"] >= LEAST), key=lambda r: r["batch"])


def headline_throughput(summary: Summary) -> Finding:
    """Requests per second over recompute's, beyond the control's gain; larger batches of few rounds are shown."""
    row = loaded(summary)
    ratio = summary["conditions"].get("config", {}).get("recompute_ratio")
    as_in_the_paper({"system": OURS, "recomputed_share": ratio})
    calm(row)
    if row["qps_ratio"] is None:
        raise NotMeasured(f"no speed-up may be reported: {row['ratio_reason']}")
    control = next(
        (r for r in summary["throughput"] if (r["system"], r["batch"]) == (CONTROL, row["batch"]) and r["qps_ratio"]),
        None,
    )
    if control is None:
        raise NotJudged(f"its control, {CONTROL}, has no ratio at batch {row['batch']}")
    calm(control)
    e, other = row["qps_ratio"], control["qps_ratio"]
    text = (
        f"{number(e['value'])}× recompute's requests a second at batch {row['batch']} {interval(e)}, n = "
        f"{row['requests']} requests in {row['rounds']} rounds; the control, {control['title']}, "
        f"{number(other['value'])}× {interval(other)}"
    )
    few = [
        f"{number(r['qps_ratio']['value'])}× at batch {r['batch']} ({r['rounds']} rounds)"
        for r in summary["throughput"]
        if r["system"] == OURS and r["rounds"] < LEAST and r["qps_ratio"]
    ]
    text += f"; of too few rounds for a verdict: {', '.join(few)}" if few else ""
    noise = max(1.0, other["high"] if other["high"] is not None else other["value"])
    return Finding(joined(grade(e, 3.5, no_effect=noise)), text)
