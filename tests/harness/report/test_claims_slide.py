"""Rules of figure 12 between their ends: what holds in part, what is shown beside, and what is no verdict at all."""

import pytest

from harness.report.paper import CLAIMS
from harness.report.verdicts import Verdict, judge
from tests.helpers.made_claims import condition, estimate, passing

BY_KEY = {c.key: c for c in CLAIMS}


def orders(value):
    def change(slide):
        for row in slide["orders"]["cuda"]["rows"]:
            row["reduction_pct"] = estimate(value) if row["staging"] == 1 else estimate(1.5)

    return change


def no_gpu(slide):
    slide["orders"]["cuda"] = None


def ended(slide):
    slide["orders"]["cuda"]["rows"] = []


def stalls(**slow):
    def change(slide):
        slide["conditions"]["slow disk, selection layer 4"] = condition(**{"reduction": 70.0, "ratio": 3.5} | slow)

    return change


def pages(*ratios):
    def change(slide):
        for row, ratio in zip(slide["gpu_pages_computed"], ratios, strict=True):
            row["ratio"] = ratio

    return change


@pytest.mark.parametrize(
    ("key", "change", "verdict", "shown"),
    [
        ("fig12a", orders(30.0), Verdict.REPRODUCED, "locked, % less at batch 2/4: 30.0 [29.4, 30.6]"),
        ("fig12a", orders(12.0), Verdict.PARTLY, "running ahead in both, % less at batch 2/4: 1.5"),
        ("fig12a", no_gpu, Verdict.NOT_RUN, "not measured on a GPU"),
        ("fig12a", ended, Verdict.NOT_RUN, "ended before"),
        ("fig12b", stalls(), Verdict.REPRODUCED, "70.0 % less [66.5, 73.5] than under LRU, whose runs wait for 20.0 %"),
        ("fig12b", stalls(reduction=50.0), Verdict.PARTLY, "50.0 % less"),
        ("fig12b", stalls(n=2), Verdict.PARTLY, "n = 2 runs"),
        ("fig12c", stalls(ratio=9.0), Verdict.REPRODUCED, "layer 4 9.00 (n = 5)"),  # shown, not judged
        ("fig12d", pages(1.7, 1.4), Verdict.PARTLY, "it would need 1.20"),
    ],
)
def test_what_holds_in_part_says_what_was_measured(key, change, verdict, shown):
    record = passing()
    change(record["slide"])
    found = judge(BY_KEY[key], record)
    assert found.verdict is verdict and shown in found.measured


def test_medians_alone_are_shown_and_not_judged():
    record = passing()
    for row in record["slide"]["orders"]["cuda"]["rows"]:
        row["reduction_pct"] |= {"low": None, "high": None}
    found = judge(BY_KEY["fig12a"], record)
    assert found.verdict is Verdict.NOT_JUDGED and "30.0 [no interval]" in found.measured


def test_other_work_beside_the_slow_disk_is_no_verdict():
    record = passing()
    record["slide"]["conditions"]["slow disk, selection layer 4"]["disturbed"] = "timings disturbed: made up"
    assert judge(BY_KEY["fig12b"], record).verdict is Verdict.NOT_JUDGED
