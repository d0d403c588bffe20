"""The agents' experiment: every system on the same tasks, resumed, summarised; the shipped model solves its tasks."""

import json

import pytest

from harness.agents.sandbox import missing
from harness.backends.reference import ReferenceBackend
from harness.experiments.agents.success import NO_CONTEXT, Plan, measure, summarise
from harness.limit import Limit
from harness.results.records import read_records
from tests.helpers.places import ROOT

pytestmark = pytest.mark.slow

MODEL = ROOT / "models" / "tiny-agents-3m"
QUICK = ("reflexion", "memgpt", "function_calling")


@pytest.fixture(scope="module")
def backend() -> ReferenceBackend:
    return ReferenceBackend(MODEL)


def test_the_shipped_model_solves_test_tasks_and_nothing_without_context(backend, tmp_path):
    plan = Plan("tiny", 4, ("recompute", NO_CONTEXT), QUICK)
    assert measure(backend, plan, tmp_path / "episodes.jsonl")
    summary = summarise(plan, list(read_records(tmp_path / "episodes.jsonl")))
    for agent in QUICK:
        rows = summary["agents"][agent]
        assert rows["recompute"]["n"] == 4 and rows["recompute"]["successes"] != [0] * 4
        assert rows[NO_CONTEXT]["success"]["value"] == 0.0
        assert rows["recompute"]["recomputed_share"] == 1.0
    assert summary["headline"]["function_calling_success"] >= 0.6


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_the_shipped_model_fixes_a_bug_in_the_sandbox(backend, tmp_path):
    plan = Plan("tiny", 1, ("recompute",), ("swe_agent",))
    assert measure(backend, plan, tmp_path / "episodes.jsonl")
    [row] = read_records(tmp_path / "episodes.jsonl")
    assert row["success"] and row["stop"] == "done"


def test_a_run_that_is_stopped_goes_on_and_counts_only_tasks_that_all_systems_finished(backend, tmp_path):
    plan, output = Plan("tiny", 2, ("recompute", "cacheslide", "naive_reuse"), ("function_calling",), layer=2), None
    output = tmp_path / "episodes.jsonl"
    assert not measure(backend, plan, output, Limit(0.0))
    part = output.with_name(f".{output.name}.part")
    assert list(read_records(part)) == []
    assert measure(backend, plan, output)
    records = list(read_records(output))
    lines = output.read_text().splitlines()
    part.write_text("\n".join([*lines[:3], lines[3][:20]]) + "\n")
    output.unlink()
    assert measure(backend, plan, output)
    again = list(read_records(output))
    assert [r["id"] for r in again] == [r["id"] for r in records]
    assert [r["success"] for r in again] == [r["success"] for r in records]
    cut = summarise(plan, [r for r in records if r["id"] != "function_calling/naive_reuse/1"])
    rows = cut["agents"]["function_calling"]
    assert {row["n"] for row in rows.values()} == {1} and rows["cacheslide"]["recomputed_share"] < 1
    assert cut["headline"]["function_calling_best_baseline"] == "naive_reuse"
    assert cut["headline"]["function_calling_cacheslide_loss_points"] == rows["cacheslide"]["loss_points"]["value"]
    json.dumps(cut)
