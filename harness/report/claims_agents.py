"""Rules for the claims about agents (figures 3, 4b, 10, 11, 13, 14) and for our own question, accuracy by turn."""

from collections.abc import Callable, Iterable
from typing import Any

from harness.inventory import AGENT_NAMES
from harness.report.claims_speed import MOST_POINTS
from harness.report.verdicts import Finding, Grade, NotMeasured, Summary, Verdict, at_most, calm, grade, joined, raced
from harness.report.words import interval, number, percent, points
from harness.results.runs import NAIVE, OURS

MODES = {"parallel": "agents at once", "beam": "beams over one prefill", "beam_batch": "copies in one packed run"}
RIVALS = {  # lower TTFT by, accuracy better by; None: no loss of more than MOST_POINTS to recompute
    "context_cache": (2.4, None),
    "cacheblend": (1.21, 1.97),
    "cacheblend_stale": (1.21, 1.97),
    "prompt_cache": (1.12, 1.41),
}


def section(summary: Summary, name: str) -> Any:
    """The table of one section of `agents:`; NotMeasured when the run lacks it."""
    found = summary.get("agents", {}).get(name)
    if not found:
        raise NotMeasured(f"the section {name!r} of agents was not measured in this run")
    return found


def inverse(e: dict[str, Any]) -> dict[str, Any]:
    """1 / an estimate, its interval ends exchanged."""
    ends = {"low": e["high"], "high": e["low"]}
    over = {k: 1 / v if v else float("inf") for k, v in ({"value": e["value"]} | ends).items() if v is not None}
    return e | ends | over


def episodes(e: dict[str, Any]) -> str:
    """Number of episodes of an estimate, in words."""
    return f"n = {e['n']} episodes"


def ours_and_rivals(agent: str) -> Callable[[Summary], Finding]:
    """Fig. 10, one agent: TTFT on the same recorded turns, scores of tasks solved with each system's own outputs."""

    def rule(summary: Summary) -> Finding:
        rows = {r["system"]: r for r in section(summary, "replay") if r["agent"] == agent}
        if OURS not in rows or rows[OURS]["score"] is None:
            raise NotMeasured(f"{agent} was not run with CacheSlide's own outputs")
        ours, loss = rows[OURS], rows[OURS]["loss_points"]
        if not rows["recompute"]["score"]["value"]:
            raise NotMeasured(
                f"the run's model solves nothing of {agent} under recompute: there is no quality to compare"
            )
        grades, speeds = [at_most(loss, MOST_POINTS)], []
        parts = [
            f"score {number(ours['score']['value'])} {interval(ours['score'])}, {points(loss['value'])} to recompute "
            f"{interval(loss, lambda x: number(x, 1))}, {episodes(ours['score'])}"
        ]
        for rival, (faster, better) in RIVALS.items():
            if rival not in rows or rows[rival]["speedup"] is None:
                continue
            speed, ratio = rows[rival]["speedup"], rows[rival]["better"]
            fairer = rival == "cacheblend" and "cacheblend_stale" in rows  # shown only; the paper ran the other form
            if not fairer:
                speeds.append(speed)
                grades.append(grade(speed, faster))
            text = f"{rows[rival]['title']}: TTFT {number(speed['value'])}× CacheSlide's {interval(speed)}"
            if better is not None:
                known = ratio is not None and ratio["value"] is not None
                if not fairer:
                    grades.append(grade(ratio, better) if known else Grade.NONE)
                text += (
                    f", CacheSlide's score {number(ratio['value'])}× its {interval(ratio)}"
                    if known
                    else ", it scores 0"
                )
            parts.append(text)
        if not speeds:
            calm(ours)
            raise NotMeasured(f"{agent}: no rival of CacheSlide was timed with reuse")
        return Finding(raced(speeds, grades), "; ".join(parts))

    return rule


def padding(summary: Summary) -> Finding:
    """Fig. 4b over reasoning rounds: F1 loss of each window against the same reuse without a window."""
    table = section(summary, "windows")
    rows = {r["system"]: r for r in table["rows"]}
    if NAIVE not in rows:
        raise NotMeasured("the same reuse without a window was not measured")
    base, grades, parts = rows[NAIVE]["f1"], [], []
    if not base["value"]:
        raise NotMeasured("the run's model makes no right call without a window: there is nothing to lose")
    for window in table["windows"]:
        e = rows[f"window@{window}"]["f1"]
        lost = 1 - e["value"] / base["value"]
        apart = None not in (e["high"], base["low"]) and e["high"] < base["low"]
        grades.append(Grade.FULL if apart and lost >= 0.781 else Grade.SOME if apart else Grade.NONE)
        full = rows[f"window_recompute@{window}"]["f1"]["value"]
        parts.append(
            f"{window} tokens: F1 {number(e['value'])} {interval(e)}, {percent(lost)} lost (recomputed {number(full)})"
        )
    text = f"without a window {number(base['value'])} {interval(base)}, {episodes(base)}; " + "; ".join(parts)
    return Finding(joined(*grades), text + "; windows scaled down with the prompts")


def advantage(modes: Iterable[str], first: float, last: float) -> Callable[[Summary], Finding]:
    """Fig. 11: ratio of the best rival's TTFT to CacheSlide's at 2 and 6; only the first of `modes` is judged.

    Without a measurement at 6 the nearest number is used. A ratio below 1 at either end is no advantage.
    """

    def rule(summary: Summary) -> Finding:
        table, parts, ends = section(summary, "load"), [], None
        for mode in modes:
            rows = {r["n"]: r for r in table if r["mode"] == mode and r["advantage"]}
            if not rows:
                continue
            ends = ends or [rows[min(rows, key=lambda n: (abs(n - at), -n))]["advantage"] for at in (2, 6)]
            each = ", ".join(
                f"{number(rows[n]['advantage']['value'])}× {interval(rows[n]['advantage'])} ({_title(rows[n])}) at {n}"
                for n in sorted(rows)
            )
            repeats = rows[min(rows)]["repeats"]
            parts.append(f"{MODES[mode]}, TTFT of the fastest rival over CacheSlide's: {each}; n = {repeats} repeats")
        if ends is None:
            for row in table:
                calm(row)
            raise NotMeasured("no load with CacheSlide and a rival was measured")
        return Finding(raced(ends, [grade(ends[0], first), grade(ends[1], last)]), "; ".join(parts))

    return rule


def _title(row: dict[str, Any]) -> str:
    """Printed name of the fastest rival in a row of the load table."""
    return next((s["title"] for s in row["systems"] if s["system"] == row["best"]), row["best"])


def steadier(summary: Summary) -> Finding:
    """Fig. 13: rate and σ beside CacheBlend's and EPIC's; a rate below a rival's is no gain, whatever its σ."""
    rows = {r["system"]: r for r in section(summary, "series")}
    rates, grades, parts = [], [], []
    for rival, rate, std in (("cacheblend", 1.496, 1 / (1 - 0.774)), ("epic", 1.452, 1 / (1 - 0.586))):
        if rival not in rows or rows[rival]["rate_ratio"] is None:
            continue
        own, spread = rows[rival]["rate_ratio"], rows[rival]["std_ratio"]
        rates.append(own)
        grades.append(grade(own, rate))
        text = (
            f"{rows[rival]['title']}: CacheSlide serves {number(own['value'])}× its requests a second {interval(own)}"
        )
        if spread is not None:
            grades.append(grade(inverse(spread), std))
            text += f" with {number(spread['value'])}× its σ {interval(spread)}"
        parts.append(text)
    if not grades:
        for row in rows.values():
            calm(row)
        raise NotMeasured("neither CacheBlend nor EPIC was loaded beside CacheSlide")
    n = rows[OURS]["rate"]["n"]
    return Finding(raced(rates, grades), "; ".join(parts) + f"; n = {n} slices in turns")


def peak(summary: Summary) -> Finding:
    """Fig. 14: whether the cell nearest top-k 0.26, τ 0.12 is the best, or its interval reaches the best.

    A map with no cell clearly below that one is flat: its best cell is then chance.
    """
    table = section(summary, "grid")
    calm(table)
    cells = [c for c in table["cells"] if c["qps"]["value"] is not None]
    best = max(cells, key=lambda c: c["qps"]["value"])
    if not best["qps"]["value"]:
        raise NotMeasured("the run's model makes no right call in any cell: there is no peak")
    near = min(cells, key=lambda c: (abs(c["recompute_ratio"] - 0.26), abs(c["tau"] - 0.12)))
    low, high = near["qps"]["low"], near["qps"]["high"]
    touches = high is not None and high >= best["qps"]["value"]
    flat = low is None or not any(c["qps"]["high"] is not None and c["qps"]["high"] < low for c in cells)
    verdict = Verdict.NOT_REPRODUCED
    if touches or near is best:
        verdict = Verdict.REPRODUCED if near is best and not flat else Verdict.PARTLY

    def shown(c: dict[str, Any]) -> str:
        return f"{number(c['qps']['value'])} {interval(c['qps'])} at {c['recompute_ratio']:g} / {c['tau']:g}"

    text = f"best {shown(best)}; near the paper's setting {shown(near)}; n = {table['episodes']} episodes"
    return Finding(verdict, f"{text}; the map is flat" if flat else text)


def _retained(rows: list[dict[str, Any]]) -> str:
    """Loss and cost of KV retained for up to k generations, one clause per system."""
    said = ""
    for system in dict.fromkeys(r["system"].split("@")[0] for r in rows):
        mine = [r for r in rows if r["system"].split("@")[0] == system]
        each = ", ".join(
            f"k = {r['system'].split('@')[1]} {points(r['loss_points']['value'])} for "
            f"{percent(r['prefill'] + r['encode'], 0)}"
            for r in mine
        )
        said += (
            f"; {mine[0]['title'].split(', limit')[0]}, KV retained for k generations: {each} of recompute's row-layers"
        )
    return said


def by_turn(summary: Summary) -> Finding:
    """Our question: CacheSlide's loss from turn 12 on, and the gain of re-encoding where corrected KV is retained."""
    rows = [r for r in section(summary, "turns") if r["loss_points"]]
    ours = [r for r in rows if r["system"] == OURS]
    if not ours:
        raise NotMeasured("no episode with CacheSlide had twelve turns")
    exact = {r["agent"]: r["late"]["value"] for r in rows if r["system"] == "recompute"}
    if not any(exact.values()):
        raise NotMeasured("the run's model makes no right call under recompute")
    grades, parts = [], []
    for row in ours:
        e = row["loss_points"]
        grades.append(at_most(e, MOST_POINTS))
        retained = [r for r in rows if r["agent"] == row["agent"] and "@" in r["system"]]
        said = f"CacheSlide {points(e['value'])} {interval(e, lambda x: number(x, 1))}, {episodes(e)}"
        parts.append(f"{AGENT_NAMES.get(row['agent'], row['agent'])}: {said}{_retained(retained)}")
    return Finding(joined(*grades), "; ".join(parts))
