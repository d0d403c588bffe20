"""Verdicts on rules over prompts that they were not chosen on, from invented records whose ratios are known."""

import json

import pytest

from cacheslide.errors import DataError
from harness.experiments.real.arms import NOISE
from harness.results import real_confirm
from harness.results.real import NOTHING
from harness.results.real_confirm import GOAL, OVER_NOTHING, OVER_RIVAL, summarise
from tests.helpers.real_records import record, write

RIVAL = "CacheBlend, by V 15 % at layer 9"
HELD = {NOISE: [0.001] * 4, NOTHING: [0.02] * 4, RIVAL: [0.2] * 4}  # KL by prompt
BOTH = {"matter": 1.0, "shift": 1.0}  # factor by setting


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(real_confirm, "LEAST", 4)


def made(arms, factors=BOTH):
    """Records of four prompts, two a data set: KL of `arms`, multiplied by `factors[setting]`, and that of `HELD`."""
    return [
        record(f"{setting} {dataset} {at}", arm, kl * (1 if arm in HELD else factor), dataset)
        for setting, factor in factors.items()
        for arm, values in (HELD | arms).items()
        for at, (dataset, kl) in enumerate(zip(("hotpotqa", "musique") * 2, values, strict=True))
    ]


def summary(folder, records):
    write(folder, "confirm-0of1", records)
    return summarise(folder)


def test_ratios_are_over_nothing_and_over_the_rival_in_every_place(tmp_path):
    out = summary(tmp_path, made({"Remembered 10 %": [0.01] * 4}))
    assert (
        len(out["ratios"]) == 2 * 3
        and out["rival"] == RIVAL
        and len(out["rows"]) == 2 * 4
        and out["schema"] == real_confirm.SCHEMA
    )
    rows = {tuple(r["key"]): r for r in out["ratios"]}
    over = rows["shift", "both", "Remembered 10 %"][OVER_NOTHING]
    assert over == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5, "n": 4})
    over = rows["matter", "musique", "Remembered 10 %"][OVER_RIVAL]
    assert over == pytest.approx({"value": 0.05, "low": 0.05, "high": 0.05, "n": 2})
    assert out["confirmed"] == {"Remembered 10 %": True} and out["failures"] == 0
    assert {tuple(r["key"]): r["value"] for r in out["rows"]}["matter", RIVAL] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("values", "factors", "holds"),
    [
        ([0.02 * GOAL] * 4, BOTH, True),
        ([0.02 * GOAL * 1.01] * 4, BOTH, False),
        ([0.012] * 4, {"matter": 1.0, "shift": 1.5}, False),  # one setting is enough to fail
        ([0.001, 0.001, 0.001, 0.045], BOTH, False),  # 0.6, but one prompt carries it: the interval reaches above 1
    ],
)
def test_a_rule_is_confirmed_only_below_the_goal_everywhere(tmp_path, values, factors, holds):
    out = summary(tmp_path, made({"Overlap 10 %": values}, factors))
    assert out["confirmed"] == {"Overlap 10 %": holds}


def test_too_few_prompts_confirm_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(real_confirm, "LEAST", 5)
    assert summary(tmp_path, made({"Overlap 10 %": [0.001] * 4}))["confirmed"] == {"Overlap 10 %": False}


def test_one_prompt_has_no_interval_and_confirms_nothing(tmp_path, capsys):
    one = [r for r in made({"Overlap 10 %": [0.001] * 4}) if r["trial"].endswith(" 0")]
    write(tmp_path, "confirm-0of1", one)
    real_confirm.main([str(tmp_path), "--out", str(tmp_path / "confirm.json")])
    assert json.loads((tmp_path / "confirm.json").read_text())["confirmed"] == {"Overlap 10 %": False}
    said = capsys.readouterr().out
    assert "not confirmed: Overlap 10 %" in said and "0.05 [no interval], n = 1" in said


def test_without_a_rival_rules_are_held_against_nothing_recomputed_alone(tmp_path):
    out = summary(tmp_path, [r for r in made({"Overlap 10 %": [0.01] * 4}) if r["arm"] != RIVAL])
    assert out["rival"] is None and all(r.keys() == {"key", OVER_NOTHING} for r in out["ratios"])
    assert out["confirmed"] == {"Overlap 10 %": True}


def test_a_folder_without_records_of_the_stage_is_one_line(tmp_path):
    write(tmp_path, "frontier-0of1", made({}))
    with pytest.raises(DataError, match="holds no records of the stage confirm"):
        summarise(tmp_path)
