"""The claims about CoPE and their rules; see `claims.py`. Without an adapter in the configuration they were not run."""

from harness.report.claims import Finding, Grade, NotMeasured, Summary, Verdict, grade, joined
from harness.report.words import interval, number, percent, points, prompts
from harness.results.runs import OURS
from harness.systems import COPE

NO_ADAPTER = "this run measured no CoPE adapter (section cope of its configuration)"
FALL = 0.28  # the paper's, at a shift of 1000 tokens


def fall(summary: Summary) -> Finding:
    """Fig. 4a, CoPE: fall of CKSim at shift 1000, by position alone and with context."""
    found = [r for r in summary.get("cksim_cope") or [] if r["shift"] == 1000]
    if not found:
        raise NotMeasured(NO_ADAPTER if not summary.get("cksim_cope") else "not measured at a shift of 1000 tokens")
    row = found[0]
    parts = [
        f"{what} {percent(1 - row[kind]['value'])}"
        for kind, what in (
            ("position_cope", "by position alone"),
            ("context_cope", "behind a real prefix"),
            ("chain_cope", "in a prompt, from the chain of fixed chunks,"),
            ("chain_ccpe", "the same with the slot at its calibrated offset"),
            ("chain_delta", "the same for re-rotated RoPE keys"),
        )
        if kind in row
    ]
    kept = row["context_cope"]
    low = kept["low"] if kept["low"] is not None else kept["value"]
    verdict = Verdict.REPRODUCED if 1 - low <= FALL else Verdict.PARTLY
    if 1 - kept["value"] > FALL:
        verdict = Verdict.NOT_REPRODUCED
    return Finding(verdict, f"falls {', '.join(parts)}; {prompts(kept)}")


def smaller_shift(summary: Summary) -> Finding:
    """Fig. 5, CoPE: position indices move less from turn to turn than the fixed segments do."""
    rows = summary.get("prompts_cope") or []
    if not rows:
        raise NotMeasured(NO_ADAPTER)
    grades, parts = [], []
    for r in rows:
        moved, cope = r["displacement"], r["shift"]["cope"]
        high = cope["high"] if cope["high"] is not None else cope["value"]
        low = moved["low"] if moved["low"] is not None else moved["value"]
        grades.append(Grade.FULL if high < low else Grade.SOME if cope["value"] < moved["value"] else Grade.NONE)
        variants = " and ".join(f"{number(x['value'], 2)} positions ({name})" for name, x in r["shift"].items())
        parts.append(f"{r['dataset']} {number(moved['value'], 1)} tokens, {variants}; {prompts(cope)}")
    return Finding(joined(*grades), "; ".join(parts))


def keeps_accuracy(summary: Summary) -> Finding:
    """Fig. 10: CacheSlide on the CoPE model against recompute on the native one; a loss of at most 3 points."""
    system = f"{OURS}{COPE}"
    rows = [r for r in summary["accuracy"] if r["scope"] == "mix" and r["system"] == system and r.get("loss_points")]
    if not rows:
        raise NotMeasured(NO_ADAPTER)
    worst = max(rows, key=lambda r: r["loss_points"]["value"])
    loss = worst["loss_points"]
    shown = interval(loss, lambda x: number(x, 1))
    share = f"{percent(worst['compute_fraction'])} of row-layers computed"
    if worst["requests_without_reuse"]:
        raise NotMeasured(f"nothing was reused in {worst['requests_without_reuse']} of {worst['prompts']} prompts")
    safe = {"value": 3.0 - loss["value"], "low": None if loss["high"] is None else 3.0 - loss["high"]}
    verdict = joined(grade(safe, 0.0, no_effect=0.0)) if loss["value"] <= 3.0 else Verdict.NOT_REPRODUCED
    verdict = Verdict.PARTLY if loss["value"] <= 3.0 and verdict is Verdict.NOT_REPRODUCED else verdict
    return Finding(verdict, f"{points(loss['value'])} on the {worst['name']} mix {shown}, {prompts(loss)}; {share}")
