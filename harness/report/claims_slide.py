"""Rules for the claims about SLIDE (paper section 4.4, figures 12a-d), judged from results/slide/summary.json.

Percentages compare with 0, factors with 1; targets are the lower ends of the paper's ranges.
"""

from typing import Any

from harness.report.verdicts import (
    LEAST,
    Finding,
    Grade,
    NotJudged,
    NotMeasured,
    Summary,
    Verdict,
    calm,
    grade,
    joined,
)
from harness.report.words import interval, number, percent

BOTTLENECK = "slow disk"  # the condition whose writes are held to 100 MiB/s
LEAST_STALLED = 0.05  # of a run's time under LRU; below it the stalls are too short to judge


def _slide(summary: Summary) -> dict[str, Any]:
    found = summary.get("slide")
    if not found:
        raise NotMeasured("results/slide/summary.json is not there: python -m harness.experiments.slide.steps makes it")
    return found


def _one(x: float) -> str:
    return number(x, 1)


def layer_latency(summary: Summary) -> Finding:
    """Fig. 12a: on a GPU, chunks in host memory, `disjoint`, loads starting with their layers; every batch counts."""
    measured = _slide(summary)["orders"]["cuda"]
    if measured is None:
        raise NotMeasured("the load-write orders were not measured on a GPU; times on a CPU are no answer")
    rows = [r for r in measured["rows"] if r["source"] == "host"]
    ours = [r["reduction_pct"] for r in rows if (r["order"], r["staging"]) == ("disjoint", 1)]
    if not ours:
        raise NotMeasured("the run on a GPU ended before it had timed chunks in host memory")
    parts = []
    for order, staging in (("disjoint", 1), ("relocate", 1), ("disjoint", 2)):
        cells = [r for r in rows if (r["order"], r["staging"]) == (order, staging)]
        each = [f"{_one(r['reduction_pct']['value'])} {interval(r['reduction_pct'], _one)}" for r in cells]
        batches = "/".join(str(r["batch"]) for r in cells)
        ahead = ", the next layer's load running ahead in both" if staging == 2 else ""
        parts.append(f"{order} against locked{ahead}, % less at batch {batches}: {', '.join(each)}")
    fewest = min((r["reduction_pct"].get("n", measured["rounds"]["host"]) for r in rows), default=0)
    text = f"{'; '.join(parts)}; n = {fewest} rounds"
    for row in rows:
        calm(row)
    if any(e["low"] is None for e in ours):
        raise NotJudged(f"medians only, without the intervals that a verdict needs: {text}")
    return Finding(joined(*(grade(e, 26.7, no_effect=0.0) for e in ours)), text)


def _main(summary: Summary) -> dict[str, Any]:
    main = _slide(summary)["main"]
    if main is None:
        raise NotMeasured("no run of the eviction orders is recorded")
    return main


def _condition(summary: Summary, name: str) -> dict[str, Any]:
    condition = _slide(summary)["conditions"].get(name)
    if not condition:
        raise NotMeasured(f"the condition {name!r} of the eviction orders is not recorded")
    return condition


def _stalled(condition: dict[str, Any]) -> float:
    """Share of a run under LRU that waits for write-back."""
    lru = condition["policies"]["lru"]
    return lru["stall_s"]["value"] / lru["seconds"]["value"]


def _layer(summary: Summary) -> str:
    """Name of the condition whose tokens are selected at the layer that validation chose: it keeps the answers."""
    layer = (summary.get("conditions") or {}).get("selection_layer")
    if layer is None:
        raise NotMeasured("no selection layer that keeps the answers was chosen in this run")
    return f"selection layer {layer}"


def write_stalls(summary: Summary) -> Finding:
    """Fig. 12b: waiting for write-back under clean-first against LRU, with writes held to 100 MiB/s.

    Writes are the bottleneck there; at the disk's own speed, waits are short. Tokens are selected at the layer chosen
    on validation, as in `bytes_written`. The same at layer 1, and the main condition, are only shown.
    """
    name = f"{BOTTLENECK}, {_layer(summary)}"
    slow = _condition(summary, name)
    calm(slow)
    e, share = slow["write_stall_reduction_pct_against_lru"], _stalled(slow)
    if e["value"] is None:
        raise NotMeasured(e["why"])
    text = (
        f"{name}, writes held to 100 MiB/s: {_one(e['value'])} % less {interval(e, _one)} than under LRU, whose runs "
        f"wait for {percent(share)} of their time, n = {e['n']} runs"
    )
    fifo = slow["write_stall_reduction_pct_against_fifo"]
    text += f"; than under FIFO {_one(fifo['value'])} % {interval(fifo, _one)}" if fifo["value"] is not None else ""
    first = _slide(summary)["conditions"].get(BOTTLENECK)
    if first and not first.get("disturbed"):
        other = first["write_stall_reduction_pct_against_lru"]
        text += f"; at layer 1 {_one(other['value'])} % {interval(other, _one)}" if other["value"] is not None else ""
    main = _slide(summary)["main"]
    full = main and main["write_stall_reduction_pct_against_lru"]
    if full and full["value"] is not None:
        text += (
            f"; there at the disk's own speed {_one(full['value'])} % {interval(full, _one)}, of stalls that are "
            f"{percent(_stalled(main))} of a run"
        )
    if share < LEAST_STALLED:
        raise NotJudged(
            f"stalls under LRU are {percent(share)} of a run, less than {percent(LEAST_STALLED, 0)}: {text}"
        )
    return Finding(joined(_of_runs(grade(e, 66.9, no_effect=0.0), e["n"])), text)


def _of_runs(found: Grade, n: int) -> Grade:
    """Caps the grade at SOME for fewer than `LEAST` runs, whose interval is their range."""
    return Grade.SOME if found is Grade.FULL and n < LEAST else found


def bytes_written(summary: Summary) -> Finding:
    """Fig. 12c: bytes written under LRU over clean-first's, tokens selected at the layer chosen on validation.

    Memory holds a third of the pages. A selection layer that loses the answers would not be the paper's method. Other
    conditions are only shown.
    """
    slide = _slide(summary)
    name = _layer(summary)
    e = _condition(summary, name)["lru_over_clean_first_bytes"]
    if e["value"] is None:
        raise NotMeasured(e["why"])
    text = f"{name}: LRU writes {number(e['value'])}× {interval(e)} of clean-first's bytes, n = {e['n']} runs"
    others = {"selection layer 1": slide["main"]} | slide["conditions"]
    shown = [
        f"{other} {number(ratio['value'])} (n = {ratio['n']})"
        for other, condition in others.items()
        if condition and other != name and not other.startswith("main ")
        for ratio in [condition["lru_over_clean_first_bytes"]]
        if ratio["value"] is not None
    ]
    text += f"; other conditions: {', '.join(shown)}" if shown else ""
    return Finding(joined(_of_runs(grade(e, 3.11), e["n"])), text)


def gpu_bytes(summary: Summary) -> Finding:
    """Fig. 12d: pages in GPU memory, counted from the traces; no intervals, no measured allocation.

    The paper assumes that PromptCache holds a copy per request. If PromptCache with shared pages needed no more than
    CacheSlide, the claim depends on this premise and holds partly at most.
    """
    rows = _slide(summary)["gpu_pages_computed"]
    if not rows:
        raise NotMeasured("no trace was recorded")
    parts, grades = [], []
    for kind in dict.fromkeys(r["requests_on"] for r in rows):
        cells = [r for r in rows if r["requests_on"] == kind]
        ratios = ", ".join(f"{number(r['ratio'])} at batch {r['batch']}" for r in cells)
        parts.append(f"requests on {kind}: {ratios}")
        grades += [Grade.FULL if r["ratio"] >= 1.63 else Grade.SOME if r["ratio"] > 1 else Grade.NONE for r in cells]
    shared = [r["prompt_cache_shared"] / r["cacheslide"] for r in rows]
    text = (
        f"PromptCache's pages with a copy a request over CacheSlide's, {'; '.join(parts)}. If PromptCache shared its "
        f"pages, it would need {number(min(shared))} to {number(max(shared))} of CacheSlide's. Counted, not measured"
    )
    verdict = joined(*grades)
    return Finding(Verdict.PARTLY if verdict is Verdict.REPRODUCED and min(shared) <= 1 else verdict, text)
