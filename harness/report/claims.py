"""Rules for the claims judged on the study's own records: reusable share, CKSim, window padding (figures 3, 4).

The rules in the claims_* modules are fixed independently of any run; `verdicts.py` defines the grades.
"""

from typing import Any

from harness.inventory import AGENT_NAMES, NO_CKSIM, has_cksim
from harness.report.verdicts import Finding, Grade, NotMeasured, NotTestable, Summary, Verdict, grade, joined
from harness.report.words import interval, number, percent, prompts
from harness.results.runs import NAIVE

COPE_FALL = 0.28  # the paper's fall of CKSim at a shift of 1000 tokens under CoPE


def reusable_share(summary: Summary) -> Finding:
    """Fig. 3: reported without a verdict, since the share is a parameter of our prompt generator."""
    if not summary["prompts"]:
        raise NotMeasured("no prompts were measured")
    parts = [
        f"{r['dataset']} {number(100 * r['reusable_share']['mean'], 1)} ± {percent(r['reusable_share']['sd'])} "
        f"(n = {r['prompts']})"
        for r in summary["prompts"]
    ]
    agents = "; ".join(
        f"{AGENT_NAMES.get(r['agent'], r['agent'])} {number(100 * r['reusable_share']['mean'], 1)} ± "
        f"{percent(r['reusable_share']['sd'])} (n = {r['prompts']} prompts of {r['episodes']} episodes)"
        for r in summary.get("agent_prompts", [])
    )
    shipped = "These are shipped prompts, not the paper's agents at work."
    end = f" Agents at work on this repository's tasks: {agents}." if agents else ""
    raise NotTestable("; ".join(parts) + f". {shipped}{end}")


def _no_cksim(summary: Summary, otherwise: str) -> str:
    return otherwise if has_cksim(summary["conditions"].get("config", {})) else NO_CKSIM


def _shift_1000(summary: Summary) -> dict[str, Any]:
    found = [r for r in summary["cksim"] if r["shift"] == 1000]
    if not found:
        raise NotMeasured(_no_cksim(summary, "CKSim was not measured at a shift of 1000 tokens"))
    return found[0]


def stale_rope(summary: Summary) -> Finding:
    """Fig. 4a: fall of CKSim at shift 1000, position only; a fall of at most CoPE's 28 % is no support.

    Rotation alone implies some fall, so a fall above 0 is no evidence.
    """
    row = _shift_1000(summary)
    kept, behind = row["position_stale"], row["context_stale"]
    lost = {"value": 1 - kept["value"], "low": None if kept["high"] is None else 1 - kept["high"]}
    lost["high"] = None if kept["low"] is None else 1 - kept["low"]
    text = (
        f"falls by {percent(lost['value'])} {interval(lost, percent)} at shift 1000 by position alone, by "
        f"{percent(1 - behind['value'])} with context; {prompts(kept)}"
    )
    return Finding(joined(grade(lost, 0.90, no_effect=COPE_FALL)), text)


def predicted_stale(summary: Summary) -> Finding:
    """Our prediction for stale RoPE keys at shift 1000."""
    kept = _shift_1000(summary)["position_stale"]
    low, high = (kept["value"] if kept[end] is None else kept[end] for end in ("low", "high"))
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
    """Fig. 4b: loss from padding against the same reuse without it."""
    rows = {(r["name"], r["system"]): r for r in summary["accuracy"] if r["scope"] == "mix" and r["questions"]}
    mixes = [name for name, system in rows if system == "window_padding" and (name, NAIVE) in rows]
    if not mixes:
        raise NotMeasured("window_padding and naive_reuse are not both in this run")
    losses, texts = [], []
    for mix in mixes:
        padded, plain = rows[mix, "window_padding"], rows[mix, NAIVE]
        base = plain["f1"]["value"]
        if not base:
            raise NotMeasured(f"reuse without padding answers nothing on the {mix} mix: there is nothing to lose")
        losses.append((base - padded["f1"]["value"]) / base)
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
