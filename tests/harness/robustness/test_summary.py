"""Campaigns count what they tried, and the summary names what is missing."""

import json

import pytest

from harness.robustness import records
from harness.robustness.rows import ROWS, outcomes
from harness.robustness.summary import build, main

FILES = {
    "bodies": {"bodies_tried": 10, "non_400": 0},
    "http_bodies": {"bodies_tried": 5, "non_400": 1, "engine_deaths": 0, "wrong_answers": 2},
    "entries": {"entries_raised": 17, "wrong_answers": 1, "engine_deaths": 0},
    "folders": {"hostile_folders_tried": 7},
    "records": {"kills": 3, "records_lost_in_kills": 0},
    "damage": {"rounds": 500},
    "writers": {"kills": 2},
}


@pytest.mark.slow
def test_killed_writers_lose_nothing_they_said_was_finished(tmp_path):
    found = records.run(0.05, 3, tmp_path)
    assert found["kills"] > 0 == found["faults"] == found["records_lost_in_kills"] == found["damage_undetected"]


def test_a_row_holds_when_a_test_passed_and_none_failed():
    some = next(iter(ROWS))
    assert not any(outcomes({}).values()) and outcomes({some: {"t": "passed", "u": "skipped"}})[some]
    assert not outcomes({some: {"t": "skipped"}})[some] and not outcomes({some: {"t": "passed", "u": "failed"}})[some]


@pytest.fixture
def folder(tmp_path):
    for name, counts in FILES.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"campaign": name, **counts, "machine": {}}))
    report = {row: {"tests/test_x.py::y": "passed"} for row in ROWS} | {"family": {"tests/test_x.py::z": "failed"}}
    (tmp_path / "tests.json").write_text(json.dumps(report))
    return tmp_path


def test_the_headline_adds_up(folder):
    found = build(folder, folder / "tests.json")
    assert found["headline"] == {
        "fault_rows_right": len(ROWS) - 1,
        "fault_rows": len(ROWS),
        "bodies_tried": 15,
        "non_400": 1,
        "engine_deaths": 0,
        "entries_raised": 17,
        "wrong_answers": 3,
        "hostile_folders_tried": 7,
        "records_lost_in_kills": 0,
    }
    assert found["rows"]["family"] == {"what": ROWS["family"], "holds": False, "tests": 1, "skipped": 0}


def test_what_is_missing_is_named(folder, capsys):
    (folder / "folders.json").unlink()
    (folder / "damage.json").write_text("{")
    assert main([str(folder), "--tests", str(folder / "tests.json"), "--out", str(folder / "s.json")]) == 2
    said = capsys.readouterr().err
    assert "damage.json" in said and "folders.json" in said and said.count("\n") == 1
    assert not (folder / "s.json").exists()
