"""The paper's claims, each with the rule by which a run's numbers get a verdict.

Rules are fixed here, apart from any run. A claim about a factor is judged by `grade`: it holds when the
measured value reaches the paper's lower end and the 95 % interval leaves out "no effect"; it points the same way when
only the latter is so. Verdicts hold for the run's model and hardware, which are not the paper's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from harness.inventory import AGENT_NAMES, NO_CKSIM, has_cksim
from harness.report.words import interval, number, percent, points, prompts
from harness.results.runs import NAIVE, OURS, REFERENCE

Summary = dict[str, Any]


class Verdict(Enum):
    """What a run says about a claim."""

    REPRODUCED = "reproduced"
    PARTLY = "partly"
    NOT_REPRODUCED = "not reproduced"
    NOT_JUDGED = "not judged"
    NOT_RUN = "not run"
    NOT_TESTABLE = "not testable here"


@dataclass(frozen=True)
class Finding:
    """A verdict and the measured numbers (or the reason) behind it."""

    verdict: Verdict
    measured: str


@dataclass(frozen=True)
class Claim:
    """One row of the claims table. `target` is the Snakemake target that makes the evidence; "" when none does yet."""

    key: str
    figure: str
    text: str
    paper: str
    rule: str
    target: str
    judge: Callable[[Summary], Finding]


class NotMeasured(Exception):
    """The run lacks what a rule needs; the message says what."""


class Disturbed(NotMeasured):
    """What a rule needs was timed beside other work, so that there is nothing to judge; the message says how much."""


class Grade(Enum):
    """How far one quantity goes along with its claim."""

    NONE, SOME, FULL = range(3)


def grade(estimate: dict[str, Any], target: float, no_effect: float = 1.0) -> Grade:
    """FULL: value >= target and interval above `no_effect`; SOME: only the interval; NONE: otherwise."""
    if estimate["low"] is None or estimate["low"] <= no_effect:
        return Grade.NONE
    return Grade.FULL if estimate["value"] >= target else Grade.SOME


def joined(*grades: Grade) -> Verdict:
    """All FULL: reproduced; all NONE: not reproduced; anything between: partly."""
    if all(g is Grade.FULL for g in grades):
        return Verdict.REPRODUCED
    return Verdict.NOT_REPRODUCED if all(g is Grade.NONE for g in grades) else Verdict.PARTLY


def judge(claim: Claim, summary: Summary) -> Finding:
    """The finding on `claim`; what was not measured is "not run", what was disturbed "not judged", with the reason."""
    try:
        return claim.judge(summary)
    except Disturbed as reason:
        return Finding(Verdict.NOT_JUDGED, str(reason))
    except NotMeasured as reason:
        return Finding(Verdict.NOT_RUN, str(reason))


def not_run(why: str) -> Callable[[Summary], Finding]:
    """A judge for what this code cannot measure yet."""
    return lambda summary: Finding(Verdict.NOT_RUN, why)


def reusable_share(summary: Summary) -> Finding:
    """Fig. 3: the number is stated, but it is a choice of our prompt generator."""
    if not summary["prompts"]:
        raise NotMeasured("no prompts were measured")
    parts = [
        f"{r['dataset']} {number(100 * r['reusable_share']['mean'], 1)} ± {percent(r['reusable_share']['sd'])} "
        f"(n = {r['prompts']})"
        for r in summary["prompts"]
    ]
    agents = summary.get("agent_prompts", [])
    said = "; ".join(
        f"{AGENT_NAMES.get(r['agent'], r['agent'])} {number(100 * r['reusable_share']['mean'], 1)} ± "
        f"{percent(r['reusable_share']['sd'])} (n = {r['prompts']} prompts of {r['episodes']} episodes)"
        for r in agents
    )
    shipped = "These are shipped prompts, not the paper's agents at work."
    end = f" Agents at work on this repository's tasks: {said}." if agents else ""
    return Finding(Verdict.NOT_TESTABLE, "; ".join(parts) + f". {shipped}{end}")


def _no_cksim(summary: Summary, otherwise: str) -> str:
    return otherwise if has_cksim(summary["conditions"].get("config", {})) else NO_CKSIM


def _shift_1000(summary: Summary) -> dict[str, Any]:
    found = [r for r in summary["cksim"] if r["shift"] == 1000]
    if not found:
        raise NotMeasured(_no_cksim(summary, "CKSim was not measured at a shift of 1000 tokens"))
    return found[0]


def stale_rope(summary: Summary) -> Finding:
    """Fig. 4a: fall of CKSim at shift 1000, position only."""
    row = _shift_1000(summary)
    kept, behind = row["position_stale"], row["context_stale"]
    lost = {"value": 1 - kept["value"], "low": None if kept["high"] is None else 1 - kept["high"]}
    lost["high"] = None if kept["low"] is None else 1 - kept["low"]
    text = (
        f"falls by {percent(lost['value'])} {interval(lost, percent)} at shift 1000 by position alone, by "
        f"{percent(1 - behind['value'])} with context; {prompts(kept)}"
    )
    return Finding(joined(grade(lost, 0.90, no_effect=0.0)), text)


def predicted_stale(summary: Summary) -> Finding:
    """Our prediction for stale RoPE keys at shift 1000."""
    kept = _shift_1000(summary)["position_stale"]
    low, high = kept["low"] or kept["value"], kept["high"] or kept["value"]
    inside, touches = 0.16 <= kept["value"] <= 0.28, low <= 0.28 and high >= 0.16
    verdict = Verdict.REPRODUCED if inside else Verdict.PARTLY if touches else Verdict.NOT_REPRODUCED
    return Finding(verdict, f"{number(kept['value'])} {interval(kept)} is left; {prompts(kept)}")


def delta_exact(summary: Summary) -> Finding:
    """Re-rotated keys against position alone."""
    if not summary["cksim"]:
        raise NotMeasured(_no_cksim(summary, "no CKSim was measured"))
    worst = min(min(r["position_delta"]["layers"]) for r in summary["cksim"])
    behind = min(summary["cksim"], key=lambda r: r["context_delta"]["value"])["context_delta"]
    text = (
        f"smallest over shifts and layers {worst:.6f}; behind a real prefix {number(behind['value'])} is left at least"
    )
    return Finding(Verdict.REPRODUCED if worst >= 0.9999 else Verdict.NOT_REPRODUCED, f"{text}; {prompts(behind)}")


def window_padding(summary: Summary) -> Finding:
    """Fig. 4b: what padding costs beside the same reuse without it."""
    rows = {(r["name"], r["system"]): r for r in summary["accuracy"] if r["scope"] == "mix" and r["questions"]}
    mixes = [name for name, system in rows if system == "window_padding" and (name, NAIVE) in rows]
    if not mixes:
        raise NotMeasured("window_padding and naive_reuse are not both in this run")
    losses, texts = [], []
    for mix in mixes:
        padded, plain = rows[mix, "window_padding"], rows[mix, NAIVE]
        base = plain["f1"]["value"]
        losses.append((base - padded["f1"]["value"]) / base if base else 0.0)
        texts.append(
            f"{mix}: F1 {number(padded['f1']['value'])} {interval(padded['f1'])} padded, {number(base)} "
            f"{interval(plain['f1'])} without, a relative loss of {percent(losses[-1])}; {prompts(padded['f1'])}"
        )
    clear = [rows[m, "window_padding"]["f1"] for m in mixes]
    apart = [
        p["high"] is not None and (rows[m, NAIVE]["f1"]["low"] or 0.0) > p["high"]
        for m, p in zip(mixes, clear, strict=True)
    ]
    grades = [
        Grade.FULL if ok and loss >= 0.781 else Grade.SOME if ok else Grade.NONE
        for ok, loss in zip(apart, losses, strict=True)
    ]
    return Finding(joined(*grades), "; ".join(texts))


def shifted_positions(summary: Summary) -> Finding:
    """Fig. 5, RoPE: fixed segments change their position index from turn to turn."""
    rows = [r for r in summary["prompts"] if r["displacement"]]
    if not rows:
        raise NotMeasured("no moves were measured")
    parts = [
        f"{r['dataset']} {number(r['displacement']['mean'], 1)} tokens "
        f"(up to {number(r['displacement']['max'], 0)}; n = {r['prompts']})"
        for r in rows
    ]
    grades = [Grade.FULL if r["displacement"]["mean"] > 0 else Grade.NONE for r in rows]
    return Finding(joined(*grades), "mean shift between two turns: " + "; ".join(parts))


def calm(row: dict[str, Any]) -> None:
    """Disturbed, if too few of the timed blocks behind a table's row were undisturbed."""
    if row.get("disturbed"):
        raise Disturbed(row["disturbed"])


def _speedup(summary: Summary, other: str) -> tuple[dict[str, Any], str]:
    """CacheSlide's TTFT advantage over `other` at the longest timed length, and how to say it."""
    rows = [r for r in summary["latency_ratios"] if r["system"] == other]
    if not rows:
        raise NotMeasured(f"{OURS} and {other} were not timed together in this run")
    row = max(rows, key=lambda r: r["tokens"])
    calm(row)
    if row["speedup"] is None:
        raise NotMeasured(f"no speed-up may be reported: {row['speedup_reason']}")
    e = row["speedup"]
    name = summary["titles"].get(other, other)
    value = f"{number(e['value'])}× at {row['tokens']:,} tokens {interval(e)}"
    return e, f"TTFT of {name} over CacheSlide's: {value}, {prompts(e)}"


def against_exact(summary: Summary) -> Finding:
    """Fig. 10 against ContextCache: faster, and a loss of at most 3 points on the worse mix."""
    speed, text = _speedup(summary, "context_cache")
    rows = [r for r in summary["accuracy"] if r["scope"] == "mix" and r["system"] == OURS and r.get("loss_points")]
    if not rows:
        raise NotMeasured("CacheSlide's accuracy was not measured against recompute")
    loss = max(rows, key=lambda r: r["loss_points"]["value"])
    e = loss["loss_points"]
    accuracy = Grade.FULL if e["value"] <= 3.0 else Grade.NONE
    shown = interval(e, lambda x: number(x, 1))
    said = f"CacheSlide {points(e['value'])} of F1 to recompute on the {loss['name']} mix {shown}, {prompts(e)}"
    return Finding(joined(grade(speed, 2.4), accuracy), f"{text}; {said}")


def against_approximate(other: str, faster: float, better: float, twin: str = "") -> Callable[[Summary], Finding]:
    """Fig. 10 against an approximate baseline: `faster` times, `better` times its F1 on the mix where that is less.

    `twin` is timed in place of `other` where that was not: a variant that does the same work or more.
    """

    def rule(summary: Summary) -> Finding:
        timed = {r["system"] for r in summary["latency_ratios"]}
        speed, text = _speedup(summary, twin if other not in timed and twin in timed else other)
        rows = [r for r in summary["accuracy_ratios"] if r["system"] == other and r["f1_ratio"]["value"] is not None]
        if not rows:
            raise NotMeasured(f"accuracy of CacheSlide over {other} was not measured")
        row = min(rows, key=lambda r: r["f1_ratio"]["value"])
        e = row["f1_ratio"]
        said = f"CacheSlide's F1 over its: {number(e['value'])}× on the {row['mix']} mix {interval(e)}, {prompts(e)}"
        return Finding(joined(grade(speed, faster), grade(e, better)), f"{text}; {said}")

    return rule


def headline_latency(summary: Summary) -> Finding:
    """Against recompute, the slowest system: the comparison that favours the claim most."""
    speed, text = _speedup(summary, REFERENCE)
    ideal = [r["compute_fraction"] for r in summary["latency"] if r["system"] == OURS and r["prompts"]][-1]
    said = f"{number(1 / ideal)}× if computing its rows were all that costs time"
    return Finding(joined(grade(speed, 3.11)), f"{text}; {said}")


def headline_throughput(summary: Summary) -> Finding:
    """Requests a second over recompute's at the largest batch."""
    rows = [r for r in summary["throughput"] if r["system"] == OURS]
    if not rows:
        raise NotMeasured("CacheSlide's throughput was not measured in this run")
    row = max(rows, key=lambda r: r["batch"])
    calm(row)
    if row["qps_ratio"] is None:
        raise NotMeasured(f"no speed-up may be reported: {row['ratio_reason']}")
    e = row["qps_ratio"]
    text = f"{number(e['value'])}× recompute's requests a second at batch {row['batch']} {interval(e)}"
    return Finding(joined(grade(e, 3.5)), f"{text}, n = {row['requests']} requests in {row['rounds']} rounds")
