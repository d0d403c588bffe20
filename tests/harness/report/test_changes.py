"""The page of verdicts before and now: it is what the committed table says, and names every claim that changed."""

import copy
import json
import sys

import pytest

from cacheslide.errors import DataError
from harness.report import changes
from harness.report.verdicts import Basis
from harness.results.runs import read_json
from harness.step import command
from tests.helpers.places import ROOT

CLAIMS = ROOT / "results/benchmark/claims.json"


def test_committed_page_is_written_from_the_committed_table(tmp_path):
    changes.main(["--claims", str(CLAIMS), "--out", str(tmp_path / "claims.md")])
    assert (tmp_path / "claims.md").read_text() == (ROOT / "docs/claims.md").read_text()


def test_a_changed_verdict_stands_first_with_its_reason():
    made = copy.deepcopy(read_json(CLAIMS))
    before = changes.page(made)
    row = next(r for r in made["claims"] if r["verdict"] == r["verdict_before"] == "partly")
    assert before.index(row["claim"]) > before.index("## The same verdict")
    row |= {"verdict": "not reproduced", "why": "one | two"}
    after = changes.page(made)
    assert after.index(row["claim"]) < after.index("## The same verdict")
    assert "| partly | not reproduced | one \\| two |" in after
    assert after.count("\n| ") == 2 * 2 + len(made["claims"])


def test_the_page_says_what_every_kind_of_evidence_is():
    assert set(changes.ON) == set(Basis)
    made = read_json(CLAIMS)
    assert {r["measured_on"] for r in made["claims"]} <= {b.value for b in Basis}
    assert all(f"`{b.value}`, {text}" in changes.page(made) for b, text in changes.ON.items())


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"schema": "other/1"}, "expected a claims table"),
        ({"schema": "cacheslide.claims/1", "claims": [{"key": "fig03"}]}, "no earlier verdicts"),
        ([], "expected a claims table"),
    ],
)
def test_another_file_is_one_line(tmp_path, content, why):
    (tmp_path / "claims.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=why):
        changes.read(tmp_path / "claims.json")


def test_an_absent_table_ends_the_command_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["changes", "--claims", "absent.json", "--out", str(tmp_path / "x.md")])
    with pytest.raises(SystemExit) as end:
        command(changes.main)
    assert end.value.code == 2 and capsys.readouterr().err == "changes: absent.json does not exist\n"
