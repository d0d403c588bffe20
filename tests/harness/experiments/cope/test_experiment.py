"""The CoPE experiments: one command on a tiny untrained model, and the kernel benchmark's headline."""

import json

import pytest

from cacheslide.training.calibration import find_calibration
from cacheslide.training.load import find_cope
from harness.experiments.cope import adapter as cope
from harness.experiments.cope import serving as cope_serving
from harness.experiments.serving.engines import SHAPES
from harness.limit import Limit
from harness.results.records import write_json
from tests.helpers.tiny_cope import make_pair

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """An untrained model and its adapter."""
    return make_pair(tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter"), layers=2, heads=2)


def test_one_command_calibrates_and_measures(pair, tmp_path):
    base, adapter = pair
    out = tmp_path / "r" / "summary.json"
    given = ["--model", str(base), "--adapter", str(adapter), "--out", str(out), "--prompts", "1", "--layer", "1"]
    cope.main([*given, "--calibration-prompts", "1", "--tokens", "400", "--minutes", "0"])
    done = json.loads(out.read_text())
    assert done["shifted_rows_reused_share"] == 1.0 and done["shifted_turns"]["turns"] == 100
    assert not done["shifted_turns"]["fallbacks"] and "adapter_f1_gap_points" in done
    assert set(done["variants"]) == {"native", "live", "gamma", "gamma_cap"}
    for name in ("live", "gamma", "gamma_cap"):
        table = done["variants"][name]
        assert set(table["f1"]) == {"recompute", "chain", "first_turn", "wca"} and table["examples"] == 1
        assert table["questions"] == table["f1"]["wca"]["values"] * 8
        assert all(len(x) == 1 and 0 < x[0] <= 1.000001 for x in table["cksim"].values())
    stored = find_calibration(adapter, json.loads((adapter / "cope.json").read_text())["digest"])
    assert stored.slot_offsets.shape == (2, 1, 2) and stored.slot_offsets.min() >= 0
    assert 0 <= done["calibration"]["unsaturated_share"] <= 1
    assert set(done["gamma_against_live"]) == {"gamma", "gamma_cap"}


def test_gamma_is_held_against_live_gates_prompt_by_prompt():
    def rows(f1, cksim):
        kinds = {kind: {"chain": cksim} for kind in cope.CKSIM}
        return {"f1": {"recompute": 1.0, "chain": f1}, "questions": 8} | kinds

    live, gamma = [rows(0.5, [0.8, None]), rows(1.0, [0.9, 0.9])], [rows(0.5, [0.9, None]), rows(1.0, [0.95, 0.95])]
    found = cope.against_live({"native": live, "live": live, "gamma": gamma})["gamma"]
    assert found["chain"]["f1_points"]["value"] == 0 and found["recompute"]["better"] == "no clear difference"
    assert found["chain"]["cksim_unsaturated_points"]["value"] == pytest.approx(7.5)
    assert found["chain"]["better"] == "gamma"
    assert cope.against_live({"live": gamma, "gamma": live})["gamma"]["chain"]["better"] == "live"


def test_the_serving_benchmarks_adapter_and_headline(tmp_path):
    setup = find_cope(cope_serving.random_tables("mistral-7b", tmp_path, 64, offsets=True))
    layers = SHAPES["mistral-7b"]["num_hidden_layers"]
    assert setup.slots == 1 and not setup.adapter.changes
    tables = [setup.adapter.positions(i) for i in range(layers)]
    assert all(t.shape == (64, 128) and t.std() > 0.05 for t in tables)
    times = {
        "rope recompute": [0.2, 0.2, 0.3],
        "cope recompute": [0.3, 0.3, 0.4],
        "cope cacheslide@0.1": [0.1, 0.1, 0.1],
    }
    steps = {"rope": [0.01, 0.01], "cope": [0.012, 0.013]}
    cells = {"ttft": {8192: {k: {"ttft": v} for k, v in times.items()}}, "decode": {16: {"step": steps}}}
    said = cope_serving.headline(cells)
    assert said["ttft_ms"]["8192 cope recompute"]["value"] == pytest.approx(300)
    ratio = said["ttft_over_rope_recompute"]
    assert ratio["8192 cope cacheslide@0.1"]["value"] == pytest.approx(0.5) and "8192 rope recompute" not in ratio
    assert said["decode_over_rope"]["x16"]["value"] == pytest.approx(1.25)


def test_a_serving_benchmark_that_is_cut_keeps_what_it_has(tmp_path, monkeypatch):
    args = cope_serving.parser().parse_args(["--out", "x", "--lengths", "64", "--shares", "0.1", "--warmups", "1"])
    result, limit, left = {"complete": False, "ttft": {}, "decode": {}}, Limit(), [3]

    def write(found) -> None:
        write_json(tmp_path / "r.json", found | {"headline": cope_serving.headline(found)})
        left[0] -= 1
        limit.end = limit.end if left[0] else 0.0

    monkeypatch.setattr(cope_serving, "fill", lambda engine, prompts, systems: None)
    monkeypatch.setattr(cope_serving, "once", lambda *a: {"ttft": [0.2], "tokens_reused": [3]})
    monkeypatch.setattr(cope_serving, "decode_step", lambda *a: 0.01)
    cope_serving.measure({"rope": None, "cope": None}, args, result, write, limit)  # a warm-up and two turns
    kept = json.loads((tmp_path / "r.json").read_text())
    assert not kept["complete"] and not kept["decode"] and kept["headline"]["decode_over_rope"] == {}
    assert {len(runs["ttft"]) for runs in kept["ttft"]["64"].values()} == {2}
    assert kept["headline"]["ttft_ms"]["64 cope recompute"]["n"] == 2
    cope_serving.measure({"rope": None, "cope": None}, args, result, lambda found: None, Limit())
    assert result["complete"] and len(result["decode"][16]["step"]["cope"]) == args.repeats
