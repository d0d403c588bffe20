"""Tables of the real model's study in documents hold what its summary holds."""

import pytest

from cacheslide.errors import DataError
from cacheslide.policies.default import DEFAULT_SYSTEM
from cacheslide.policies.registry import load_policy
from harness.report.real_documents import CONFIRMATION, OTHER, SUMMARY, filled, main
from harness.results.runs import read_json
from tests.helpers.places import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "docs/real.md"]


@pytest.fixture(scope="module")
def summary():
    return read_json(ROOT / SUMMARY)


@pytest.fixture(scope="module")
def confirmation():
    return read_json(ROOT / CONFIRMATION)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_tables_say_what_was_measured(path, summary, confirmation):
    text = path.read_text()
    assert text.count("| arm |") >= 1 and filled(text, summary, confirmation) == text
    stale = text.replace("| `Nothing recomputed`", "| `Nothing recomputed` | 9", 1)
    assert filled(stale, summary, confirmation) != stale


def test_the_default_is_the_rule_that_was_confirmed(summary, confirmation):
    text = (ROOT / "docs/real.md").read_text()
    rows = text.split(f"| {OTHER} |")[1].split("\n\n")[0].splitlines()[2:]
    assert {row.split("|")[1].strip(" `") for row in rows} == set(confirmation["confirmed"])
    assert [row.split("|")[1].strip() for row in rows if row.endswith("| yes |")] == [
        "`Mixed, two thirds remembered 15 %`"
    ]
    rule = load_policy(DEFAULT_SYSTEM).correction
    assert (rule.total_ratio, rule.remembered, rule.overlap) == (0.15, 2 / 3, 1 / 3)
    stale = text.replace("| `Overlap, half first 5 %` |", "| `Overlap, half first 5 %` | 9", 1)
    assert filled(stale, summary, confirmation) != stale
    for bad in (
        f"| {OTHER} | confirmed |\n| `Nobody` | 1 |\n",
        f"| {OTHER} | `x`, over nothing recomputed |\n{rows[0]}\n",
    ):
        with pytest.raises(DataError, match="the confirmation has no"):
            filled(bad, summary, confirmation)


def made(value: float, n: int = 4, arm: str = "Some 10 % at layer 1", setting: str = "matter") -> dict:
    kl = {"value": value, "low": value / 2, "high": value * 12}
    return {
        "key": [setting, "both", arm],
        "n": n,
        "compute_fraction": 0.256,
        "answer": {"kl": kl},
        "flips": {"value": 0.35},
    }


def test_cells_by_column():
    rows = [made(0.00123), made(0.25, 2, "Few"), made(3.0, setting="shift")]
    ratio = {"comparison": "rpdc over pic", "dataset": "both", "setting": "matter", "of": "a", "over": "b"}
    study = {"frontier": rows, "comparisons": [ratio | {"value": 0.5, "low": 0.25, "high": 1.5}]}
    text = """before | x
| arm | KL, `matter` | shift | computed | greedy text changed |
| --- | --- | --- | --- | --- |
| n | | | | |
| `Some 10 % at layer 1`: words | | | | |

| arm | matter |
| --- | --- |
| `Few` | |

| comparison | matter |
| --- | --- |
| RPDC over PIC | |

| arm | of another table |
| `Unknown` | 7 |
"""
    lines = filled(text, study).splitlines()
    assert lines[0] == "before | x" and lines[3] == "| n | 4 | 4 | 4 | 4 |"
    assert (
        lines[4]
        == "| `Some 10 % at layer 1`: words | 0.00123 [0.000615, 0.0148] | 3.00 [1.50, 36.0], 26 % | 0.26 | 35 % |"
    )
    assert lines[8] == "| `Few` | 0.250 [0.125, 3.00], 26 % (n 2) |"
    assert lines[12] == "| RPDC over PIC | 0.500 [0.250, 1.50] (`a` / `b`) |" and lines[15] == "| `Unknown` | 7 |"
    for bad in ("| arm | matter |\n| `Nobody` | 1 |\n", "| comparison | shift |\n| RPDC over PIC | 1 |\n"):
        with pytest.raises(DataError, match="the study has no"):
            filled(bad, study)


def test_the_command_fills_files_and_refuses_another_schema(tmp_path):
    path, other = tmp_path / "a.md", tmp_path / "s.json"
    path.write_text("| arm | computed |\n| --- | --- |\n| `Nothing recomputed` | 9 |\n")
    main([str(path), "--summary", str(ROOT / SUMMARY)])
    assert path.read_text().splitlines()[2].startswith("| `Nothing recomputed` | 0.")
    for raw, schema in (('{"schema": "x"}', "'x'"), ("[]", "None")):
        other.write_text(raw)
        with pytest.raises(DataError, match=f"schema {schema}"):
            main([str(path), "--summary", str(other)])
