"""Tables of the frontier, from invented records whose means are known."""

from pathlib import Path

import pytest

from harness.experiments.rules.frontier_cells import NOTHING, RECOMPUTE, STALE, settings
from harness.results.frontier import LAYERS, REPORTED, choose_layers, front, layer_scores, tabulate
from tests.helpers.made_frontier import Made, frontier_result, record

BY_K = "CacheSlide, by K 10 %"


def setting(name: str):
    return next(s for s in settings(24) if s.name == name)


def swept(f1: dict[int, tuple[list[float], float]], prompt: str = "a") -> list[dict]:
    return [record(LAYERS, setting(BY_K).cells[layer].name, prompt, values, c) for layer, (values, c) in f1.items()]


def test_the_layer_has_the_best_f1_and_of_equals_the_least_compute():
    records = swept({1: ([0, 1], 0.4), 6: ([1, 1], 0.5), 12: ([1, 1], 0.7)})
    assert choose_layers(settings(24), records) == {BY_K: 6}
    records += swept({1: ([1, 1], 0.4), 6: ([0, 0], 0.5), 12: ([1, 1], 0.7)}, "b")
    assert choose_layers(settings(24), records) == {BY_K: 12}
    assert layer_scores(setting(BY_K), records)[1] == (0.75, 0.4)


def test_candidates_are_compared_on_the_prompts_that_all_answered():
    records = swept({1: ([0, 0], 0.4), 6: ([1, 0], 0.5)}) + swept({1: ([1, 1], 0.4)}, "b")
    assert layer_scores(setting(BY_K), records) == {1: (0.0, 0.4), 6: (0.5, 0.5)}
    assert choose_layers(settings(24), [r | {"part": REPORTED} for r in records]) == {}


def reported(f1: dict[str, dict[str, list[float]]], layers: dict[str, int] | None, name: str) -> Made:
    cells = {s.name: s.cells[(layers or {}).get(s.name)] for s in settings(24) if s.name in f1}
    records = [record(REPORTED, cells[s].name, p, x) for s, own in f1.items() for p, x in own.items()]
    return Made(Path(name), settings(24), records, layers=layers)


def test_losses_are_paired_by_model_and_prompt_and_means_hold_every_seed():
    one = reported({RECOMPUTE: {"a": [1, 1], "b": [1, 0]}, NOTHING: {"a": [0, 1], "b": [0, 0]}}, {}, "seed-0")
    two = reported({RECOMPUTE: {"a": [1, 1]}, NOTHING: {"a": [1, 1], "b": [1, 1]}, STALE: {"a": [0, 1]}}, {}, "seed-1")
    result = tabulate([one, two], {"prompts": 2, "layer_prompts": 0})
    rows = {r["setting"]: r for r in result["rows"]}
    nothing = rows[NOTHING]
    assert nothing["f1"]["value"] == pytest.approx(5 / 8) and nothing["f1"]["models"] == 2
    assert nothing["loss_points"]["value"] == pytest.approx(100 * 2 / 6)  # not where recompute has no answer
    assert nothing["loss_points"]["n"] == 3 and nothing["by_model"]["seed-0"]["f1"] == 0.25
    assert result["headline"]["naive_loss_points"] == nothing["loss_points"]
    assert result["headline"]["stale_loss_points"]["value"] == 50 and result["headline"]["isolated_loss_points"] is None
    assert [m["complete"] for m in result["models"]] == [False, False] and BY_K in result["not_measured"]


def test_a_setting_is_read_at_the_layer_chosen_for_each_model():
    models = [reported({BY_K: {"a": [float(i)]}}, {BY_K: layer}, f"seed-{i}") for i, layer in enumerate((6, 12))]
    models[0].records += reported({BY_K: {"a": [1.0]}}, {BY_K: 16}, "x").records  # of a layer that is not the choice
    models.append(reported({}, None, "seed-2"))  # its layers are not chosen yet
    [row] = tabulate(models, {"prompts": 1, "layer_prompts": 1})["rows"]
    assert row["f1"]["value"] == 0.5 and row["loss_points"] is None
    assert {name: own["layer"] for name, own in row["by_model"].items()} == {"seed-0": 6, "seed-1": 12}


def test_intervals_hold_the_spread_of_seeds_as_well_as_of_prompts():
    alike = [reported({RECOMPUTE: {p: [x] for p, x in zip("abcd", (0, 1, 1, 1), strict=True)}}, {}, n) for n in "xyz"]
    apart = [reported({RECOMPUTE: {p: [x] for p in "abcd"}}, {}, n) for n, x in (("x", 0.5), ("y", 1), ("z", 0.75))]
    for done in (alike, apart):
        f1 = tabulate(done, {"prompts": 4, "layer_prompts": 0})["rows"][0]["f1"]
        assert f1["value"] == 0.75 and f1["n"] == 12 and f1["low"] < 0.6 and f1["high"] > 0.9


def test_the_front_rises_with_compute():
    def at(name, compute, f1):
        return {"setting": name, "compute_fraction": compute, "f1": {"value": f1}}

    assert front([at("a", 0.2, 0.1), at("b", 0.3, 0.1), at("c", 0.3, 0.5), at("d", 0.9, 0.4)]) == ["a", "c"]


def test_a_complete_result_names_nothing_as_missing():
    result = frontier_result(models=2, prompts=2)
    assert all(m["complete"] for m in result["models"]) and not result["not_measured"]
    assert len(result["rows"]) == len(settings(24))
    gains = {r["setting"]: r["gain_over_random_points"] for r in result["rows"]}
    assert gains["Remembered 10 %"]["n"] == 4 and gains["Random tokens 10 %"] is gains["ProphetKV 10 %"] is None
