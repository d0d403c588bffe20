"""Disturbed timings in the tables of single experiments: engines, servers, files, CoPE and the store."""

import json
from dataclasses import replace

import pytest

from harness.experiments.cope import serving as cope_serving
from harness.experiments.serving import disk_ttft
from harness.experiments.serving.client import Condition, table
from harness.experiments.serving.engine_ttft import _cell, parser
from harness.report.paper import CLAIMS
from harness.report.verdicts import Verdict, judge
from harness.results import slide
from harness.results.serving import build
from harness.results.undisturbed import FEW
from tests.helpers.readings import BUSY, CALM
from tests.helpers.serving_cells import RECORDS, START, cell, written
from tests.helpers.serving_files import load
from tests.helpers.slide_runs import run_record

pytestmark = pytest.mark.fault("disturbed_timing")


def read_beside(made, readings):
    for run, reading in zip(made["runs"], readings, strict=True):
        run["quiet"] = reading
    return made


def test_turns_of_an_engine_that_were_disturbed_are_left_out(tmp_path):
    readings = [CALM, BUSY, CALM]
    base = read_beside(cell("recompute", [[0.2], [0.9], [0.2]]), readings)
    ours = read_beside(cell("cacheslide@0.26", [[0.1], [5.0], [0.1]], 0.4), readings)
    [exact, row] = build([written(tmp_path, [START, base, ours])], None)["runs"][0]["table"]
    assert row["recompute_over_ttft"] | {"value": 2.0, "n": 2} == row["recompute_over_ttft"]
    assert exact["ttft_ms"]["value"] == pytest.approx(200) and not row["disturbed"]
    busy = read_beside(cell("cacheslide@0.26", [[0.1], [5.0], [0.1]], 0.4), [BUSY, BUSY, CALM])
    made = build([written(tmp_path, [START, base, busy])], None)
    row = made["runs"][0]["table"][1]
    assert row["disturbed"].startswith(FEW) and "recompute_over_ttft" not in row and "efficiency" not in row
    assert row["ttft_ms"]["value"] == pytest.approx(100) and made["headline"] == {}


def test_an_overhead_beside_other_work_is_no_headline(tmp_path):
    records = json.loads(json.dumps(RECORDS))
    records[2]["quiet"] = [BUSY, BUSY]
    made = build([written(tmp_path, records)], None)
    assert made["runs"][0]["plugin_overhead_pct"]["disturbed"].startswith(FEW)
    assert "plugin_overhead_pct" not in made["headline"]
    records[2]["quiet"] = [BUSY, CALM]
    assert build([written(tmp_path, records)], None)["headline"]["plugin_overhead_pct"] == pytest.approx(1.0)


def test_every_run_of_an_engine_carries_its_turns_reading(monkeypatch):
    def once(engine, prompts, system, batch, tokens):
        if system == "broken":
            raise RuntimeError("made to fail")
        return {"ttft": [0.1]}

    monkeypatch.setattr("harness.experiments.serving.engine_ttft.once", once)
    args = parser().parse_args(["--out", "x", "--repeats", "2", "--warmups", "1"])
    prompts = type("Made", (), {"tokens": 8})()
    found = _cell(None, prompts, ["recompute", "broken", "cacheslide@0.26"], 1, args)
    assert found["broken"] == ([], "made to fail")
    for system in ("recompute", "cacheslide@0.26"):
        assert [set(run["quiet"]) for run in found[system][0]] == [set(CALM)] * 2
    assert found["recompute"][0][0]["quiet"] is found["cacheslide@0.26"][0][0]["quiet"]


def test_a_servers_ratio_needs_two_loads_with_nothing_beside_them():
    base = Condition("vllm", 512, 1)
    ours = Condition("cacheslide", 512, 1, None, 0.26, "cpu")
    other = replace(ours, recompute_ratio=0.1)
    loads = {base: load(0.4, None), ours: load(0.1, 400), other: load(0.1, 400)}
    rows = {r["recompute_ratio"]: r for r in table(loads, {base: CALM, ours: BUSY, other: CALM})}
    assert rows[0.26]["ttft_ratio"] is None and rows[0.26]["ratio_reason"].startswith(FEW)
    assert rows[0.1]["ttft_ratio"]["value"] == pytest.approx(0.25) and rows[0.1]["quiet"] == CALM
    rows = {r["recompute_ratio"]: r for r in table(loads, {base: BUSY, ours: CALM, other: CALM})}
    assert rows[0.1]["ttft_ratio"] is None and rows[0.1]["disturbed"]


def test_disk_reads_take_the_median_of_undisturbed_turns():
    row = disk_ttft._row(64, "file", [[0.1], [9.0], [0.1]], [CALM, BUSY, CALM])
    assert row["ttft_s"]["value"] == 0.1 and not row["disturbed"] and len(row["runs"]) == 3
    row = disk_ttft._row(64, "file", [[0.1], [9.0]], [BUSY, BUSY])
    assert row["disturbed"].startswith(FEW) and row["ttft_s"]["n"] == 2


def test_the_cope_benchmark_gives_no_ratio_of_disturbed_repeats():
    times = {"rope recompute": [0.2, 0.2, 9.0], "cope recompute": [0.3, 0.3, 90.0]}
    steps = {"rope": [0.01, 0.01], "cope": [0.012, 0.013]}
    cells = {"ttft": {64: {k: {"ttft": v} for k, v in times.items()}}, "decode": {16: {"step": steps}}}
    said = cope_serving.headline(cells | {"quiet": {"ttft 64": [CALM, CALM, BUSY], "decode 16": [BUSY, BUSY]}})
    assert said["ttft_over_rope_recompute"]["64 cope recompute"]["value"] == pytest.approx(1.5)
    assert said["decode_over_rope"] == {} and said["decode_step_ms"]
    assert list(said["disturbed"]) == ["decode 16"] and said["disturbed"]["decode 16"].startswith(FEW)


@pytest.mark.parametrize(("marked", "reduction"), [(1, 75.0), (3, None)])
def test_stalls_are_of_undisturbed_runs_and_bytes_of_all(tmp_path, marked, reduction):
    runs = []
    for seed in range(3):
        slow = 100.0 if seed < marked else 1.0
        for policy, size, stall in (("clean-first", 100, 0.5 * slow), ("lru", 350, 2.0), ("fifo", 400, 1.0)):
            reading = BUSY if seed < marked and policy == "clean-first" else CALM
            runs.append(run_record(policy, seed, size, stall) | {"quiet": reading})
            runs.append(runs[-1] | {"condition": "slow disk, selection layer 4"})  # where stalls are judged
    (tmp_path / "volume.jsonl").write_text("\n".join(map(json.dumps, runs)))
    found = slide.summarise(tmp_path, {})
    assert found["headline"]["lru_over_clean_first_bytes"] == pytest.approx(3.5)
    assert found["headline"]["write_stall_reduction_pct"] == (reduction and pytest.approx(reduction))
    [claim] = [c for c in CLAIMS if c.key == "fig12b"]
    finding = judge(claim, {"slide": found, "conditions": {"selection_layer": 4}})
    assert (finding.verdict is Verdict.NOT_JUDGED) is (reduction is None)
    assert reduction is not None or finding.measured.startswith(FEW)
