"""What the version before said and wrote is understood: requests, options, configurations, records, dashboards."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cacheslide import renamed
from cacheslide.errors import ConfigError, ModelError, PromptError
from cacheslide.training.calibration import FILES, Calibration, find_calibration, save_calibration
from cacheslide.vllm.options import Annotations, ServerOptions, receipt_in
from harness.configuration import check
from harness.experiments.serving.plan import read_plan
from harness.inventory import read_config
from harness.results.provenance import ROOT
from harness.results.records import SCHEMA, read_records
from harness.results.runs import read_json

OLD = {
    "system": "cacheslide",
    "rows": 10,
    "rows_reused": 5,
    "rows_recomputed": 2,
    "rows_per_layer": [10, 4],
    "row_layer_share": 0.7,
    "chunks": 1,
}
NEW = {
    "system": "cacheslide",
    "tokens": 10,
    "tokens_reused": 5,
    "tokens_recomputed": 2,
    "tokens_per_layer": [10, 4],
    "compute_fraction": 0.7,
    "chunks": 1,
}


def test_a_request_may_use_either_name_but_not_both():
    old, new = ({"cacheslide": {"segments": [[0, 4]], name: 0.5}} for name in ("share", "recompute_ratio"))
    assert Annotations.parse(old) == Annotations.parse(new) != Annotations.parse({"cacheslide": {"segments": [[0, 4]]}})
    with pytest.raises(PromptError, match="share is the old name of recompute_ratio: give one of them"):
        Annotations.parse({"cacheslide": {"segments": [[0, 4]], "share": 0.5, "recompute_ratio": 0.5}})


def test_a_server_and_a_configuration_too(tmp_path):
    assert ServerOptions.from_extra_config({"rows_per_step": 77}).tokens_per_step == 77
    with pytest.raises(ConfigError, match="rows_per_step is the old name"):
        ServerOptions.from_extra_config({"rows_per_step": 77, "tokens_per_step": 77})
    config = read_config(ROOT / "config/smoke.yaml")
    config["topk"] = config.pop("recompute_ratio") / 2
    check(config, ROOT / "workflows/schemas/config.schema.yaml")
    assert config["recompute_ratio"] == 0.13 and "topk" not in config
    config["topk"] = 0.5  # `snakemake --config topk=0.5` over a file that has today's name
    check(config, ROOT / "workflows/schemas/config.schema.yaml")
    assert config["recompute_ratio"] == 0.5
    turns = config["agents"]["turns"]
    turns["kept"] = turns.pop("retained")
    check(config, ROOT / "workflows/schemas/config.schema.yaml")
    assert turns["retained"] == ["naive_reuse"] and "kept" not in turns
    grid = read_config(ROOT / "config/cpu.yaml")["agents"]["grid"]
    config["agents"]["grid"] = grid | {"shares": grid["recompute_ratios"]}
    del config["agents"]["grid"]["recompute_ratios"]
    check(config, ROOT / "workflows/schemas/config.schema.yaml")
    assert config["agents"]["grid"]["recompute_ratios"] == grid["recompute_ratios"]
    text = (ROOT / "config/serving-smoke.yaml").read_text().replace("recompute_ratios:", "shares:")
    (tmp_path / "serving.yaml").write_text(text)
    plan = read_plan(ROOT / "config/serving-smoke.yaml")
    assert read_plan(tmp_path / "serving.yaml") == plan and plan.recompute_ratios == (0.1, 0.26)
    (tmp_path / "serving.yaml").write_text(text + "recompute_ratios: [0.5]\n")
    with pytest.raises(ConfigError, match="shares is the old name of recompute_ratios"):
        read_plan(tmp_path / "serving.yaml")


def test_a_receipt_is_read_by_old_clients_and_by_new_ones():
    both = renamed.receipt_for_all(NEW)
    assert both == OLD | NEW
    assert receipt_in({"cacheslide": both}) == receipt_in({"cacheslide": OLD}) == NEW
    assert receipt_in(None) is None and receipt_in({"other": 1}) is None


def test_names_of_receipts_change_nothing_else():
    record = {"rows": [OLD, {"rows": 3}], "row_layer_share": 0.5, "text": "rows_reused"}
    assert renamed.record(record) == {"rows": [NEW, {"rows": 3}], "compute_fraction": 0.5, "text": "rows_reused"}
    assert renamed.record(renamed.record(record)) == renamed.record(record)


def test_old_records_are_read_under_the_names_of_today(tmp_path):
    lines = [{"schema": SCHEMA, "settings": {}}, {"id": "e0", "receipt": OLD}]
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    [record] = read_records(tmp_path / "old.jsonl")
    assert record["receipt"] == NEW
    (tmp_path / "summary.json").write_text(json.dumps({"accuracy": [OLD]}))
    assert read_json(tmp_path / "summary.json") == {"accuracy": [NEW]}


def test_a_calibration_of_before_is_read(tmp_path):
    made = Calibration(torch.rand(2, 1, 4), "adapter", "template", 0.5)
    save_calibration(made, tmp_path)
    tensors = load_file(tmp_path / FILES[0])
    assert list(tensors) == ["slot_offsets"]
    save_file({"masses": tensors["slot_offsets"]}, tmp_path / FILES[0])
    assert torch.equal(find_calibration(tmp_path, "adapter").slot_offsets, made.slot_offsets)
    save_file(tensors | {"masses": made.slot_offsets.clone()}, tmp_path / FILES[0])
    with pytest.raises(ModelError, match="masses is the old name of slot_offsets"):
        find_calibration(tmp_path, "adapter")
    [shipped] = load_file(ROOT / "models/tiny-llama-12m-cope" / FILES[0]).keys()
    assert shipped == "masses"  # a file that the version before has written


def test_other_names_of_records():
    old = {"masses": True, "live_mass_std_by_layer": [1], "ratio_to_stock": 2.0, "stock": {"ms": 1.0}}
    new = {"slot_offsets": True, "live_offset_std_by_layer": [1], "ratio_to_row_attention": 2.0, "stock": {"ms": 1.0}}
    assert renamed.record(old) == new
    shares = {"cells": [{"share": 0.5, "tau": 0.1}], "shares": [0.5], "taus": [0.1]}
    ratios = {"cells": [{"recompute_ratio": 0.5, "tau": 0.1}], "recompute_ratios": [0.5], "taus": [0.1]}
    assert renamed.record(shares) == ratios
    reused = {"reusable_rows": 4, "share": 0.5}  # of what could be reused
    assert renamed.record(reused) == reused
    engines = {"stock": {"ttft": [1.0]}, "plugin": {"ttft": [2.0]}}
    assert renamed.record(engines) == {"vanilla": {"ttft": [1.0]}, "plugin": {"ttft": [2.0]}}


@pytest.mark.vllm
def test_dashboards_find_counters_under_both_names():
    pytest.importorskip("vllm")
    from cacheslide.vllm.scheduler.metrics import OLD_COUNTERS, ReuseStats

    stats = ReuseStats()
    stats.record(NEW | {"tokens_prefix_cached": 1, "chunks_hit": 1, "bytes_loaded": 4, "fallback": ""})
    assert stats.data["tokens_reused"] == stats.data["rows_reused"] == 5
    assert set(OLD_COUNTERS) == {"rows", "rows_reused", "rows_recomputed", "rows_prefix_cached"}
