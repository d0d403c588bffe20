"""Stages on a tiny model with made GPU samples: every kind of cell, what is left over, and how a stage goes on."""

import pytest

from cacheslide.errors import ConfigError
from harness.experiments.serving.reproduction import run as stage_run
from harness.experiments.serving.reproduction.__main__ import main
from harness.experiments.serving.reproduction.cells import Cell
from harness.experiments.serving.reproduction.run import engine_options, run_stage
from harness.experiments.serving.reproduction.serve import serving_plan
from harness.experiments.serving.reproduction.stages import plan
from harness.limit import Limit
from harness.results.records import read_file
from tests.helpers.checkpoints import save_random
from tests.helpers.gpu_samples import Made
from tests.helpers.made_reproduction import settings, written

SHAPE = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 96, "max_position_embeddings": 1024}


def test_an_engine_has_room_for_its_largest_cell_and_the_store_for_every_recipe(tmp_path):
    own = settings(tmp_path, dtype="bfloat16", store_device="model", engine={"block_size": 16})
    cells = [Cell("ttft", "base", n, 1, 0.9, ("recompute", "epic", "cacheslide")) for n in (4096, 32768)]
    connector, options = engine_options(own, cells)
    assert connector["chunk_size"] == 32768 and connector["store_gib"] > 2 * 0.9 * 32768 * own.token_gib
    assert options["max_model_len"] > 32768 and options["load_format"] == "dummy" and options["block_size"] == 16
    assert 0.15 < options["gpu_memory_utilization"] < 0.4
    served = serving_plan(own, "folder", [Cell("server", "clients", 512, 8, 0.9, ("epic",), device="model")])
    assert served.batches == (8,) and served.options.store_gib > 8 * 0.9 * 512 * own.token_gib


def test_without_a_gpu_the_command_ends_with_one_line(tmp_path):
    path = written(tmp_path, device="cuda")
    with pytest.raises(ConfigError, match=r"no NVIDIA GPU can be read here|GPUs are needed"):
        main(["run", "--config", str(path), "--stage", "1", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.usefixtures("vllm_environment")
def test_a_stage_is_measured_cell_by_cell_and_goes_on_where_it_ended(tmp_path, monkeypatch, capfd):
    pytest.importorskip("vllm")
    monkeypatch.setattr(stage_run, "open_source", lambda device, count: Made(50.0, 60.0, 300.0))
    monkeypatch.setattr(stage_run, "REST_S", 0.1)
    model = save_random(tmp_path / "model", **SHAPE)
    own = settings(tmp_path, model=str(model), systems=["cacheblend", "context_cache", "cacheslide_mixed"])
    stage, out = plan(own).stages[0], tmp_path / "out"
    assert [c.kind for c in stage.cells] == ["ttft", "ttft", "ttft", "energy"]
    counted = iter([1e9, 1e9, 0.0])  # seconds left before each cell, and behind a record
    monkeypatch.setattr(Limit, "left", property(lambda self: next(counted, 0.0)))
    assert run_stage(own, stage, out, Limit(1)) == 3 and not (out / stage.file).exists()
    monkeypatch.setattr(Limit, "left", property(lambda self: 1e9))
    assert run_stage(own, stage, out, Limit(1)) == 0
    file = read_file(out / stage.file)
    assert [r["id"] for r in file.records] == [c.id for c in stage.cells]
    for record in file.records:
        for name, arm in record["arms"].items():
            assert not arm["failed"] and len(arm["runs"]) == record["cell"]["repeats"], (record["id"], name)
            for run in arm["runs"]:
                assert run["gpu"]["power_mean_w"] >= 60 and run["gpu"]["idle_w"] and "quiet" in run
    energy = file.records[-1]["arms"]["cacheslide_mixed@0.05"]["runs"][0]
    assert energy["requests"] == len(energy["ttft"]) >= 1 and energy["seconds"] >= own.energy_s
    assert file.records[0]["provenance"]["config_hash"] and file.settings["settings"]["run"] == "tiny"
    assert run_stage(own, stage, out, Limit(1)) == 0 and "nothing to measure" in capfd.readouterr().err


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.usefixtures("vllm_environment")
def test_thresholds_of_the_papers_rule_are_a_grid(tmp_path):
    pytest.importorskip("vllm")
    model = save_random(tmp_path / "model", **SHAPE)
    own = settings(tmp_path, model=str(model), systems=["cacheslide"], taus=[0.12, 0.5])
    [stage] = [s for s in plan(own).stages if s.name == "grid"]
    assert run_stage(own, stage, tmp_path / "out", Limit()) == 0
    [record] = read_file(tmp_path / "out" / stage.file).records
    assert set(record["arms"]) == {"recompute", "cacheslide_tau_0.12@0.1", "cacheslide_tau_0.5@0.1"}
    assert not any(arm["failed"] for arm in record["arms"].values())


@pytest.mark.server
@pytest.mark.vllm
@pytest.mark.slow
def test_servers_are_measured_by_a_streaming_client_beside_their_pages(tmp_path, monkeypatch, vllm_environment):
    pytest.importorskip("vllm")
    monkeypatch.setattr(stage_run, "open_source", lambda device, count: Made(60.0, 300.0))
    model = save_random(tmp_path / "model", **SHAPE)
    own = settings(tmp_path, model=str(model), systems=["naive_reuse"], engine={"block_size": 32, "enforce_eager": True,
                                                                             "kv_cache_gib": 0.25})  # fmt: skip
    for stage in (s for s in plan(own).stages if s.name == "server"):
        assert run_stage(own, stage, tmp_path / "out", Limit()) == 0
        for record in read_file(tmp_path / "out" / stage.file).records:
            assert not record["failed_warmups"] and len(record["requests"]) == 2 * 2
            assert not any(r["failure"] for r in record["requests"]) and all(r["tpot"] for r in record["requests"])
            for request in record["requests"] if record["cell"]["device"] else ():
                assert request["receipt"]["tokens_reused"] > 300
