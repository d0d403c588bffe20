"""The audit of static choices: its cells, and what it says of the stress task, whose shortcut is known."""

import json

import pytest

from harness.backends.reference import ReferenceBackend
from harness.experiments.rules import static_choices
from harness.experiments.rules.static_cells import RATIOS, Forms, static_cells
from harness.results.runs import read_json

pytestmark = pytest.mark.slow
MODEL = "models/tiny-llama-12m"


@pytest.fixture(scope="module")
def forms() -> Forms:
    return Forms.of(ReferenceBackend(MODEL).tokenizer)


@pytest.mark.parametrize("layers", [2, 8, 24])
def test_a_static_choice_is_held_against_random_tokens_at_its_ratio(forms, layers):
    found = {c.name: c for c in static_cells(layers, forms)}
    assert len(found) == len(static_cells(layers, forms))
    for cell in found.values():
        cell.policy.check(layers)
        if cell.factor == "static":
            base = found[cell.base].policy
            assert base.recipe == cell.policy.recipe
            assert base.correction.total_ratio == cell.policy.correction.total_ratio
    assert sum(c.factor == "static" for c in found.values()) == len(RATIOS) * len(forms.rules())


def test_forms_are_read_from_the_vocabulary(forms):
    ids = ReferenceBackend(MODEL).encode
    assert set(ids(" .\n")) <= forms.ends < forms.delimiters and set(ids(" amber acorn")) <= forms.names
    assert not forms.names & forms.delimiters and not set(ids(" granite")) & (forms.names | forms.delimiters)


def test_the_stress_task_has_its_known_shortcut(tmp_path, capsys):
    """One prompt suffices: the last tokens of sentences answer nearly everything, stale positions cost nothing."""
    out = tmp_path / "audit.json"
    static_choices.main(["--out", str(out), "--prompts", "1", "--datasets", "hotpotqa-deep", "--tokens", "400"])
    result = read_json(out)
    assert result["families"] == ["stress"] and "last of a sentence, 10%" in capsys.readouterr().out
    told = result["headline"]["deep"]
    assert told["static_choice_gain_points"]["value"] > 15 and told["naive_loss_points"]["value"] > 15
    assert abs(told["stale_loss_points"]["value"]) < 5 and "provenance" in json.loads(out.read_text())


def test_headline_takes_the_best_static_choice_at_the_judged_ratios():
    def row(cell: str, factor: str, option: str, gain: float, loss: float = 0.0) -> dict:
        both = {k: {"value": v, "low": v - 1, "high": v + 2} for k, v in (("gain_points", gain), ("loss_points", loss))}
        return {"cell": cell, "factor": factor, "option": option, **both}

    told = static_choices.headline(
        [
            row("naive", "no correction", "naive", 0, 40),
            row("stale positions", "no correction", "stale positions", -12),
            row("a, 3%", "static", "3%", 50),
            row("a, 10%", "static", "10%", 2),
            row("b, 26%", "static", "26%", 7),
            row("remembered, 26%", "deviation", "26%", 60),
            row("remembered, stale positions, 26%", "deviation", "26%", -20),
        ]
    )
    assert told["static_choice_gain_points"] == {"value": 7, "low": 6, "high": 9, "choice": "b, 26%"}
    assert told["stale_loss_points"] == {"value": 12, "low": 10, "high": 13}
    assert told["stale_corrected_loss_points"] == {"value": 20, "low": 18, "high": 21}
    assert told["naive_loss_points"]["value"] == 40 and "isolated_loss_points" not in told
