"""The claims table as JSON: what stands in a row, earlier verdicts beside it, and that the committed one is current."""

import json

import pytest

from cacheslide.errors import DataError
from harness.report.__main__ import main
from harness.report.builder import read_summary
from harness.report.paper import CLAIMS
from harness.report.table import as_json, read_before, rows
from harness.report.verdicts import Verdict
from harness.results.provenance import ROOT
from harness.results.records import write_json
from harness.results.runs import Run, read_json
from harness.results.summary import build_summary
from tests.helpers.made_claims import passing

COMMITTED = ROOT / "results/benchmark"


def test_a_row_says_what_it_was_measured_on_and_what_stood_there_before():
    record = passing() | {"provenance": {"git_commit": "abc"}}
    record["conditions"]["model"] = "made-up"
    before = {"rules_of": "old", "claims": {"fig12c": {"verdict": "reproduced", "why": "because"}}}
    made = as_json(record, rows(record), before)
    row = next(r for r in made["claims"] if r["key"] == "fig12c")
    assert (row["measured_on"], row["verdict"], row["counts_as"]) == ("stress", "reproduced", "12c")
    assert (row["verdict_before"], row["why"], made["rules_before"]) == ("reproduced", "because", "old")
    assert made["figures"]["10"] == "partly" and made["counts"]["reproduced"] == 12 and made["records_of"] == "abc"
    assert "verdict_before" not in as_json(record, rows(record))["claims"][0]


def test_numbers_of_ledger_prompts_are_not_said_to_be_of_the_stress_task():
    record = passing()
    record["accuracy"] = [row | {"name": "hotpotqa-ledger"} for row in record["accuracy"]]
    on = {row.claim.key: row.measured_on for row in rows(record)}
    assert on["fig10-contextcache"] == on["fig03"] == on["headline-throughput"] == "ledger"
    assert on["fig10-reflexion"] == on["fig12c"] == on["turns"] == "stress"  # agents and traces of the other models
    assert (on["fig12a"], on["fig05-rope"], on["fig10-mpt"]) == ("shapes", "recorded sessions", "–")


def test_committed_table_is_what_the_rules_say_of_the_committed_results():
    summary = read_summary(ROOT / "results/cpu/summary.json")
    now = as_json(summary, rows(summary), read_before(COMMITTED / "claims_before.json"))
    assert json.loads(json.dumps(now)) == read_json(COMMITTED / "claims.json")


def test_a_verdict_that_changed_says_why():
    table = read_json(COMMITTED / "claims.json")["claims"]
    assert [r["key"] for r in table] == [c.key for c in CLAIMS]
    assert {r["verdict_before"] for r in table} <= {v.value for v in Verdict}
    for row in table:
        assert row["why"] and (row["verdict"] == row["verdict_before"] or not row["why"].startswith("unchanged"))


def test_command_writes_the_table(tmp_path, capsys):
    write_json(tmp_path / "results/r/summary.json", build_summary(Run({"run": "r"})))
    out = tmp_path / "claims.json"
    assert main(["r", "--root", str(tmp_path), "--claims", str(out)]) == 0
    assert {r["verdict"] for r in read_json(out)["claims"]} == {"not run"}
    write_json(tmp_path / "before.json", {"claims": {"fig99": {"verdict": "partly"}}})
    both = ["r", "--root", str(tmp_path), "--claims", str(out), "--before", str(tmp_path / "before.json")]
    assert main(both) == 2 and "no such claim: fig99" in capsys.readouterr().err


@pytest.mark.parametrize("broken", [[], {}, {"claims": []}, {"claims": {"fig12c": "partly"}}])
def test_a_file_without_verdicts_is_one_line(tmp_path, broken):
    write_json(tmp_path / "before.json", broken)
    with pytest.raises(DataError, match="a verdict by claim"):
        read_before(tmp_path / "before.json")


def test_sessions_of_another_schema_are_one_line(tmp_path):
    write_json(tmp_path / "summary.json", build_summary(Run({"run": "r"})))
    write_json(tmp_path / "sessions.json", {"schema": "other/1"})
    with pytest.raises(DataError, match="other/1"):
        read_summary(tmp_path / "summary.json", None, None, tmp_path / "sessions.json")
