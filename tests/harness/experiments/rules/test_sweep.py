"""The sweep of correction rules on the stress task: its cells, its records, its tables."""

import json
from dataclasses import replace

import pytest

from cacheslide.policies.none import NoCorrection
from cacheslide.policies.question_aware import QuestionAware
from cacheslide.policies.registry import load_policy
from cacheslide.store import MemoryChunkStore
from harness.backends.reference import EngineSettings
from harness.experiments.rules import sweep as rules
from harness.experiments.rules.cells import FIRST, RATIOS, cells
from harness.experiments.wca import sweep as wca
from harness.results.records import read_records
from tests.helpers.tiny_cope import make_pair

pytestmark = pytest.mark.slow

LAYERS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained model of enough layers for every kind of cell."""
    base, _ = make_pair(tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter"), LAYERS, heads=1, p_max=8)
    return base


@pytest.mark.parametrize("layers", [1, 2, 3, 6, 8])
def test_cells_fit_the_model_and_differ_from_their_base_in_the_rule_alone(layers):
    found = {c.name: c for c in cells(layers)}
    assert len(found) == len(cells(layers))
    for cell in found.values():
        cell.policy.check(layers)
        assert cell.asks is isinstance(cell.policy.correction, QuestionAware)
        if cell.base:
            base = found[cell.base].policy
            assert base.recipe == cell.policy.recipe and base.correction != cell.policy.correction
            assert base.correction.total_ratio == cell.policy.correction.total_ratio


def test_a_sweep_is_tabulated_and_what_is_there_is_not_measured_again(model, tmp_path, monkeypatch):
    given = ["--model", str(model), "--out", str(tmp_path), "--tokens", "400", "--jobs", "0", "--prompts", "1"]
    rules.main(given)
    records, names = list(read_records(tmp_path / "rope.jsonl")), [c.name for c in cells(LAYERS)]
    assert [r["cell"] for r in records] == 2 * names
    rows = {
        r["cell"]: r for r in json.loads((tmp_path / "summary.json").read_text())["models"]["rope"]["mixes"]["deep"]
    }
    assert list(rows) == names and rows["recompute"]["loss_points"]["value"] == 0
    assert rows["recompute"]["compute_fraction"] == 1.0
    fractions = [rows[f"{FIRST}, {r:.0%}"]["compute_fraction"] for r in RATIOS]
    assert fractions == sorted(fractions) and rows["no correction, first turn"]["compute_fraction"] < fractions[0]
    at = f"{RATIOS[-1]:.0%}"
    assert rows[f"shrinking, {at}"]["compute_fraction"] < rows[f"{FIRST}, {at}"]["compute_fraction"]
    asked, by_k = (rows[f"{rule}, 10%, layer 4"]["compute_fraction"] for rule in ("question-aware", "by K"))
    assert rows[f"{FIRST}, 10%"]["compute_fraction"] < asked < by_k < 1
    monkeypatch.setattr(wca, "measure", None)
    rules.main(given)
    assert list(read_records(tmp_path / "rope.jsonl")) == records


def test_a_question_in_the_prompt_is_answered_as_one_behind_it():
    """Rules that look at the question have one prefill each: that alone changes no answer."""
    backend = wca.open_backend(wca.Job("models/tiny-llama-12m", None, False, "cpu", 1))
    [example, *_] = wca.prompts_of(["deep"], 1, 400, 0)
    policy = load_policy("cacheslide_first_turn")
    for rule in (NoCorrection(), policy.correction.at_layer(2)):
        engine = backend.engine(replace(policy, correction=rule), MemoryChunkStore(), EngineSettings())
        engine.build(backend.prompt(example.previous))
        behind, [one] = wca.answered(backend, engine, example, asks=False)
        inside, each = wca.answered(backend, engine, example, asks=True)
        assert behind == inside and len(set(inside)) > 1 and len(each) == len(inside) == len(example.questions)
        assert {r.tokens_recomputed for r in each} == {one.tokens_recomputed} and one.tokens_reused > 0
