"""The second half of the house in numbers: what they are read from, and what a failing test does to them."""

import json
import subprocess

import pytest

from cacheslide.errors import CacheSlideError
from harness.results import house
from harness.results.provenance import ROOT

TESTS = {"seconds": 41.26, "passed": 3, "quiet": {"disturbed": False}}


def test_the_committed_records_give_the_headline():
    made = house.summary(ROOT / "results", TESTS, [])
    assert made["headline"].keys() == {
        "served_lru_over_clean_first_bytes",
        "lookup_us_1e6",
        "startup_s_1e5_pages",
        "wrong_pages_served",
        "undeclared_inputs",
        "rules_rerun_for_latency_repeats",
        "test_fast_s",
        "records_changed",
    }
    assert made["headline"]["test_fast_s"] == 41.3 and made["headline"]["records_changed"] == 0
    assert made["headline"]["lookup_us_1e6"] == max(made["lookup_us"].values())
    assert json.loads(json.dumps(made))


def test_what_was_not_compared_is_no_zero():
    assert house.summary(ROOT / "results", TESTS, None)["headline"]["records_changed"] is None
    assert house.summary(ROOT / "results", TESTS, ["a"])["headline"]["records_changed"] == 1


@pytest.mark.parametrize("code, out", [(1, "1 failed, 2 passed in 3s"), (0, "nothing was run")])
def test_a_run_that_fails_gives_no_time(monkeypatch, code, out):
    ended = subprocess.CompletedProcess([], code, stdout=out, stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: ended)
    with pytest.raises(CacheSlideError, match="pytest --fast ended"):
        house.fast_tests(ROOT)
