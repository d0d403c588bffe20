"""Rules for the claims about SLIDE (paper section 4.4, figures 12a-d), judged from results/slide/summary.json.

Percentages compare with 0, factors with 1; targets are the lower ends of the paper's ranges.
"""

from typing import Any

from harness.report.claims import Finding, Grade, NotMeasured, Summary, Verdict, calm, grade, joined
from harness.report.words import interval, number


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
        return Finding(Verdict.NOT_JUDGED, f"medians only, without the intervals that a verdict needs: {text}")
    return Finding(joined(*(grade(e, 26.7, no_effect=0.0) for e in ours)), text)


def _main(summary: Summary) -> dict[str, Any]:
    main = _slide(summary)["main"]
    if main is None:
        raise NotMeasured("no run of the eviction orders is recorded")
    return main


def write_stalls(summary: Summary) -> Finding:
    """Fig. 12b: waiting for write-back under clean-first against LRU, this disk at its own speed."""
    calm(_main(summary))
    e = _main(summary)["write_stall_reduction_pct_against_lru"]
    if e["value"] is None:
        raise NotMeasured(e["why"])
    text = f"{_one(e['value'])} % less {interval(e, _one)} than under LRU, n = {e['n']} runs; stalls are short here"
    slow = (_slide(summary)["conditions"].get("slow disk") or {}).get("write_stall_reduction_pct_against_lru")
    if slow and slow["value"] is not None:
        text += f"; with writes held to 100 MiB/s {_one(slow['value'])} % {interval(slow, _one)}, n = {slow['n']}"
    return Finding(joined(grade(e, 66.9, no_effect=0.0)), text)


def bytes_written(summary: Summary) -> Finding:
    """Fig. 12c: bytes written under LRU over clean-first's, memory for a third of the pages; other conditions shown."""
    e = _main(summary)["lru_over_clean_first_bytes"]
    if e["value"] is None:
        raise NotMeasured(e["why"])
    text = f"LRU writes {number(e['value'])}× {interval(e)} of clean-first's bytes, n = {e['n']} runs"
    others = []
    for name, condition in _slide(summary)["conditions"].items():
        found = condition and condition["lru_over_clean_first_bytes"]
        if found and found["value"] is not None and not name.startswith("main"):
            others.append(f"{name} {number(found['value'])} (n = {found['n']})")
    text += f"; other conditions: {', '.join(others)}" if others else ""
    return Finding(joined(grade(e, 3.11)), text)


def gpu_bytes(summary: Summary) -> Finding:
    """Fig. 12d: pages in GPU memory, counted from the traces: no intervals, and no allocation was measured."""
    rows = _slide(summary)["gpu_pages_computed"]
    if not rows:
        raise NotMeasured("no trace was recorded")
    parts, grades = [], []
    for kind in dict.fromkeys(r["requests_on"] for r in rows):
        mine = [r for r in rows if r["requests_on"] == kind]
        ratios = ", ".join(f"{number(r['ratio'])} at batch {r['batch']}" for r in mine)
        parts.append(f"requests on {kind}: {ratios}")
        grades += [Grade.FULL if r["ratio"] >= 1.63 else Grade.SOME if r["ratio"] > 1 else Grade.NONE for r in mine]
    shared = [r["prompt_cache_shared"] / r["cacheslide"] for r in rows]
    text = (
        f"PromptCache's pages with a copy a request over CacheSlide's, {'; '.join(parts)}. If PromptCache shared its "
    )
    text += (
        f"pages, it would need {number(min(shared))} to {number(max(shared))} of CacheSlide's. Counted, not measured"
    )
    return Finding(joined(*grades), text)
