"""Rules for the claims about CoPE (figures 4a, 5, 10). Without an adapter configured: not run."""

from harness.report.claims import COPE_FALL
from harness.report.claims_speed import MOST_POINTS, worst_loss
from harness.report.verdicts import (
    Estimate,
    Finding,
    Grade,
    NotMeasured,
    Summary,
    Verdict,
    as_in_the_paper,
    at_most,
    joined,
)
from harness.report.words import interval, number, percent, points, prompts
from harness.results.runs import OURS
from harness.systems import COPE

NO_ADAPTER = "this run measured no CoPE adapter (section cope of its configuration)"


def _above(a: Estimate, b: Estimate) -> Grade:
    """FULL: a lies above b, intervals apart; SOME: only the value does; NONE: otherwise."""
    if a["value"] <= b["value"]:
        return Grade.NONE
    return Grade.FULL if None not in (a["low"], b["high"]) and a["low"] > b["high"] else Grade.SOME


def fall(summary: Summary) -> Finding:
    """Fig. 4a, CoPE: fall of CKSim at shift 1000 with context, and CKSim beside that of re-rotated RoPE keys.

    By position alone both are exactly 1, so segments cached in the chain of fixed chunks are compared, on the same
    prompts. CoPE has an advantage over RoPE only if its CKSim exceeds that of re-rotation.
    """
    rows = [r for r in summary.get("cksim_cope") or [] if r["shift"] == 1000]
    if not rows:
        raise NotMeasured(NO_ADAPTER if not summary.get("cksim_cope") else "not measured at a shift of 1000 tokens")
    row = rows[0]
    if "chain_delta" not in row:
        raise NotMeasured("re-rotated RoPE keys were not measured beside CoPE's")
    parts = [
        f"{what} {percent(1 - row[kind]['value'])} {interval(_lost(row[kind]), percent)}"
        for kind, what in (
            ("position_cope", "by position alone"),
            ("context_cope", "behind a real prefix"),
            ("chain_cope", "in a prompt, from the chain of fixed chunks,"),
            ("chain_ccpe", "the same with the slot at its calibrated offset"),
            ("chain_delta", "the same for re-rotated RoPE keys"),
        )
        if kind in row
    ]
    beats = _above(row["chain_cope"], row["chain_delta"])
    kept = at_most(_lost(row["context_cope"]), COPE_FALL)
    verdict = Verdict.NOT_REPRODUCED if Grade.NONE in (beats, kept) else joined(beats, kept)
    return Finding(verdict, f"falls {', '.join(parts)}; {prompts(row['context_cope'])}")


def _lost(kept: Estimate) -> Estimate:
    """1 - CKSim, its interval ends exchanged."""
    ends = {"low": kept["high"], "high": kept["low"]}
    return {"value": 1 - kept["value"]} | {k: None if v is None else 1 - v for k, v in ends.items()}


def smaller_shift(summary: Summary) -> Finding:
    """Fig. 5, CoPE: position indices move less from turn to turn than the fixed segments do.

    Indices saturate at p_max - 1, so a mean over all indices is small by construction. The shift is therefore divided
    by the share of indices below that bound.
    """
    rows = summary.get("prompts_cope") or []
    if not rows:
        raise NotMeasured(NO_ADAPTER)
    grades, parts = [], []
    for r in rows:
        moved, shift, free = r["displacement"], r["shift"]["cope"], r["unsaturated"]["cope"]
        index = _over(shift, free)
        grades.append(_above(moved, index))
        variants = " and ".join(f"{number(x['value'], 2)} positions ({name})" for name, x in r["shift"].items())
        parts.append(
            f"{r['dataset']} {number(moved['value'], 1)} tokens {interval(moved, _one)}, indices below p_max - 1 "
            f"{number(index['value'], 1)} {interval(index, _one)}, all indices {variants}; {prompts(shift)}"
        )
    return Finding(joined(*grades), "; ".join(parts))


def _over(a: Estimate, b: Estimate) -> Estimate:
    """a / b with the widest interval of the quotient; None for an end that does not exist."""
    ends = {"low": (a["low"], b["high"]), "high": (a["high"], b["low"])}
    out = {k: None if top is None or not bottom else top / bottom for k, (top, bottom) in ends.items()}
    return out | {"value": a["value"] / b["value"] if b["value"] else float("inf")}


def _one(x: float) -> str:
    return number(x, 1)


def keeps_accuracy(summary: Summary) -> Finding:
    """Fig. 10: CacheSlide on the CoPE model against recompute on the native one; a loss of at most 3 points."""
    worst = worst_loss(summary, f"{OURS}{COPE}", NO_ADAPTER)
    if worst["requests_without_reuse"]:
        raise NotMeasured(f"nothing was reused in {worst['requests_without_reuse']} of {worst['prompts']} prompts")
    as_in_the_paper(worst)
    loss = worst["loss_points"]
    share = f"{percent(worst['compute_fraction'])} of row-layers computed"
    text = f"{points(loss['value'])} on the {worst['name']} mix {interval(loss, _one)}, {prompts(loss)}; {share}"
    return Finding(joined(at_most(loss, MOST_POINTS)), text)
