"""The sweep of WCA's open points: its cells, its records, its tables."""

import json

import pytest

from cacheslide.policies.none import NoCorrection
from cacheslide.policies.top_deviation import TopDeviation
from harness.experiments.wca import sweep as wca
from harness.experiments.wca.cells import cells, default
from harness.results.records import read_records
from harness.results.wca import tabulate
from tests.helpers.tiny_cope import make_pair

pytestmark = pytest.mark.slow

LAYERS = 6


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """An untrained model of enough layers for every kind of cell, and its adapter."""
    return make_pair(tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter"), LAYERS, heads=1, p_max=8)


def test_cells_change_one_thing_and_fit_the_model():
    for layers in (2, 3, 6, 8):
        found = {c.name: c for c in cells(layers)}
        assert len(found) == len(cells(layers)) and "recompute" in found
        for cell in found.values():
            rule = cell.policy.correction
            assert cell.base is None or cell.base in found
            assert all(i < layers for i in cell.capture) and cell.capture >= cell.policy.probe_layers
            if isinstance(rule, TopDeviation):
                assert rule.layer < layers and all(p.layer + 1 < layers for p in rule.promote)
                assert not rule.swap or rule.layer + rule.swap.every < layers  # a swap that never comes is no cell
            if cell.base:
                usual = found[cell.base].policy
                same = [getattr(cell.policy, f) == getattr(usual, f) for f in ("keying", "encoding", "correction")]
                assert rule.layer == usual.correction.layer and sum(same) in (1, 2) and not all(same)
    factors = {c.factor for c in cells(8)}
    assert factors >= {"fusion", "gate and swap", "selection layer", "encoding", "promotion", "no correction", "metric"}
    plain = [c.policy for c in cells(8) if c.factor == "no correction"]
    assert len({p.recipe for p in plain}) == 3 and all(p.correction == NoCorrection() for p in plain)


def test_a_sweep_resumes_extends_and_is_tabulated(pair, tmp_path):
    base, adapter = map(str, pair)
    given = ["--model", base, "--out", str(tmp_path), "--tokens", "400", "--jobs", "0", "--adapter", adapter]
    wca.main([*given, "--prompts", "1", "--minutes", "0"])  # the clock stops each model behind its first prompt
    first = {kind: list(read_records(tmp_path / f"{kind}.jsonl")) for kind in ("rope", "cope")}
    names = [c.name for c in cells(LAYERS)]
    assert all([r["cell"] for r in found] == names for found in first.values())
    lines = (tmp_path / "cope.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cope.jsonl").write_text("".join(lines[:-3]))  # as if three cells were missing
    wca.main([*given, "--prompts", "1"])
    for kind, before in first.items():
        now = list(read_records(tmp_path / f"{kind}.jsonl"))
        assert len({r["id"] for r in now}) == len(now) == 2 * len(names)
        strip = [{k: v for k, v in r.items() if k != "device"} for r in now if r["example"] == before[0]["example"]]
        assert sorted(strip, key=lambda r: names.index(r["cell"])) == [
            {k: v for k, v in r.items() if k != "device"} for r in before
        ]
    done = json.loads((tmp_path / "summary.json").read_text())
    for kind in ("rope", "cope"):
        rows = {r["cell"]: r for r in done["models"][kind]["mixes"]["deep"]}
        assert list(rows) == names
        assert rows["recompute"]["compute_fraction"] == 1.0 and rows["recompute"]["loss_points"]["value"] == 0
        usual, promoted = rows[default(2, 0.26)], rows["promotion: 26 % + 3 × 5 %, layer 2"]
        assert usual["recomputed_share"] == pytest.approx(0.26, abs=0.01)
        assert promoted["compute_fraction"] > usual["compute_fraction"] > rows[default(2, 0.10)]["compute_fraction"]
        assert promoted["gain_points"]["n"] == 2 and promoted["recomputed_share"] == pytest.approx(0.41, abs=0.02)
    assert done["models"]["rope"]["settings"]["model"] != done["models"]["cope"]["settings"]["model"]


def test_tables_count_answers_by_depth_and_pair_them():
    def record(example, f1):
        about = {"mix": "deep", "device": "cpu", "alpha": None, "tokens_reused": 3, "tokens_recomputed": 1}
        return {
            "example": example,
            "f1": f1,
            "depth": [0, 2],
            "volatile": [False, True],
            "compute_fraction": 0.5,
        } | about

    chosen = [c for c in cells(8) if c.name in ("recompute", default(2, 0.26), "metric: V, layer 2")]
    f1 = {"recompute": [[1, 1], [1, 1]], default(2, 0.26): [[1, 0], [1, 1]], "metric: V, layer 2": [[1, 1]]}
    records = {n: {f"e{i}": record(f"e{i}", x) for i, x in enumerate(given)} for n, given in f1.items()}
    [rows] = tabulate({"rope": ({"model": "m"}, records)}, chosen)["models"]["rope"]["mixes"].values()
    usual, metric = (next(r for r in rows if r["cell"] == n) for n in (default(2, 0.26), "metric: V, layer 2"))
    assert [(d["depth"], d["f1"]["value"], d["f1"]["values"]) for d in usual["by_depth"]] == [(0, 1, 2), (2, 0.5, 2)]
    assert usual["f1_volatile"] == 0.5 and metric["f1_volatile"] == 1
    assert usual["loss_points"]["value"] == 25 and usual["recomputed_share"] == 0.25
    assert metric["gain_points"] == {"value": 50, "low": None, "high": None, "n": 1, "values": 2}
