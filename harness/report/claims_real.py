"""Real-model results for the paper's claims: one rule, and numbers shown beside the verdicts of other rules.

The numbers do not change those verdicts: the rules of those claims concern answers and times, which this study does
not measure.
"""

from collections.abc import Sequence

from harness.report.real import MAIN, PRINTED, Real, Row, blend, estimate, kl, row
from harness.report.verdicts import Finding, Grade, NotJudged, NotMeasured, Summary, joined
from harness.results.real import NOTHING, POOLED

BESIDE = {  # claim: arms whose distance from recompute bears on it
    "fig04a-rope": (NOTHING, "Chain, stale positions"),
    "fig04b": (NOTHING, "Window padding"),
    "fig10-contextcache": (PRINTED, "ContextCache"),
    "fig10-cacheblend-stale": (PRINTED, "CacheBlend, stale positions"),
    "fig10-cacheblend": (PRINTED, "CacheBlend, best"),
    "fig10-promptcache": (PRINTED, "PromptCache"),
}


def rpdc_over_pic(summary: Summary) -> Finding:
    """Paired ratio of KL by setting, nothing recomputed on either side; below 1, order-preserving reuse is closer."""
    real = summary.get("real")
    if not real:
        raise NotMeasured("results/real/summary.json is not there: snakemake real makes it")
    ratios = [r for r in real["comparisons"] if (r["comparison"], r["dataset"]) == ("rpdc over pic", POOLED)]
    if not ratios:
        raise NotMeasured("the study on a real model has not both arms on the same prompts")
    parts = [f"{r['setting']} {estimate(r)} (n = {r['n']} prompts)" for r in ratios]
    text = f"KL of RPDC over PIC's, nothing recomputed: {'; '.join(parts)}"
    if any(r["high"] is None for r in ratios):
        raise NotJudged(f"values without the intervals that a verdict needs: {text}")
    return Finding(joined(*(Grade.FULL if r["high"] < 1 else Grade.NONE for r in ratios)), text)


def beside(key: str, summary: Summary) -> str:
    """The real model's numbers on the claim `key`; "" without any."""
    real = summary.get("real")
    if not real or key not in BESIDE:
        return ""
    rows = {arm: blend(real) if arm == "CacheBlend, best" else row(real, arm) for arm in BESIDE[key]}
    if not all(rows.values()):
        return ""
    return divergences(real, [r for r in rows.values() if r])


def divergences(real: Real, rows: Sequence[Row]) -> str:
    """KL of some arms, with the model, the setting and the number of prompts."""
    parts = [f"{r['key'][2]} {kl(r)}" for r in rows]
    model = real["conditions"].get("frontier", {}).get("model")
    return f"{model}, KL to recompute in setting {MAIN}: {'; '.join(parts)}; n = {min(r['n'] for r in rows)} prompts"
