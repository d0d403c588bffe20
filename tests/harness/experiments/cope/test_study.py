"""The study on a CoPE adapter: its steps on a tiny untrained model, and that they change nothing of the native run."""

import json

import pytest
import torch

from cacheslide.training import calibration as ccpe
from harness.configuration import native
from harness.experiments.cope import steps as study_cope
from harness.results.curves import moves_table
from harness.results.provenance import config_hash
from harness.results.records import read_records, read_settings
from harness.results.runs import load_run
from harness.systems import cope_systems, policy_of, resolve, scalable, to_scale
from harness.tasks.data import write_dataset
from tests.helpers.tiny_cope import make_pair

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A configuration with a calibrated adapter: Γ of half a position for every head."""
    folders = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    base, adapter = make_pair(*folders, layers=2, heads=2, p_max=256)  # gates of 0.5 never saturate
    digest = json.loads((adapter / "cope.json").read_text())["digest"]
    ccpe.save_calibration(ccpe.Calibration(torch.full((2, 1, 2), 0.5), digest, "t", 0.5), adapter)
    return {
        "run": "test",
        "model": str(base),
        "device": "cpu",
        "dtype": "float32",
        "store_dtype": "bfloat16",
        "systems": ["recompute", "cacheslide"],
        "chunk_size": 256,
        "suffix_len": 1,
        "recompute_ratio": 0.26,
        "accuracy": {"questions": 2},
        "cksim": {"shifts": [0, 60]},
        "cope": {
            "adapter": str(adapter),
            "systems": ["recompute", "naive_reuse", "cacheslide"],
            "prompts": 2,
            "cksim_prompts": 1,
        },
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "hotpotqa-deep.jsonl"
    write_dataset(path, "hotpotqa-deep", "test", 3, 3, 400)
    return str(path)


def test_answers_join_the_native_run_under_names_of_their_own(config, data, tmp_path):
    outputs = [tmp_path / "accuracy" / "hotpotqa-deep" / f"{s}.jsonl" for s in cope_systems(config)]
    study_cope.step_cope_accuracy(config, data, 1, list(map(str, outputs)), 1)
    shares = {}
    for path in outputs:
        records = list(read_records(path))
        assert len(records) == 2 and all(r["prefill_seconds"] is None for r in records)
        assert read_settings(path)["calibrated"] is True
        shares[path.stem] = records[0]["receipt"]["compute_fraction"]
    assert shares["recompute_cope"] == 1 > shares["cacheslide_cope"] > shares["naive_reuse_cope"]
    run = load_run(config, accuracy=outputs)
    assert run.titles["cacheslide_cope"] == "CacheSlide, CoPE"
    assert run.order(["cacheslide_cope", "cacheslide", "a"]) == ["cacheslide", "cacheslide_cope", "a"]


def test_a_policy_keeps_its_rules_on_cope():
    here, there = resolve(["cacheslide", "cacheslide_cope"], layer=3)
    assert there.correction == here.correction and there.keying == here.keying and there.name == "cacheslide_cope"
    assert policy_of("recompute_cope").title == "Recompute, CoPE"
    assert scalable(["cacheslide_cope", "recompute_cope"]) == ["cacheslide_cope"]
    assert to_scale(["cacheslide_cope"], 0.26) == []


def test_cksim_of_cope_follows_its_predictions(config, data, tmp_path):
    study_cope.step_cope_similarity(config, data, str(tmp_path / "c.jsonl"), 1)
    found = {r["shift"]: r["cksim"] for r in read_records(tmp_path / "c.jsonl")}
    kinds = {f"{why}_{how}" for why in ("position", "context", "chain") for how in ("cope", "ccpe")}
    assert set(found[60]) == kinds | {"chain_stale", "chain_delta"} and set(found) == {0, 60}
    assert all(min(x) > 1 - 1e-5 for x in found[0].values())  # nothing moved, nothing was put in front
    for how in ("cope", "ccpe"):
        assert min(found[60][f"position_{how}"]) > 1 - 1e-5
        assert found[60][f"chain_{how}"][0] > 1 - 1e-5 > found[60][f"chain_{how}"][1]  # only layer 1 sees context
    # A slot in front of everything is crossed by nobody; one behind the system prompt is.
    assert found[60]["context_ccpe"] == pytest.approx(found[60]["context_cope"], abs=1e-6)
    assert found[60]["chain_ccpe"][1] != pytest.approx(found[60]["chain_cope"][1], abs=1e-6)
    assert found[60]["chain_stale"][0] < 0.999 < found[60]["chain_delta"][0]


def test_positions_move_with_the_slot_unless_its_offset_is_canonical(config, data, tmp_path):
    study_cope.step_cope_prompts(config, [data], str(tmp_path / "p.json"), 1)
    content = json.loads((tmp_path / "p.json").read_text())
    [move] = content["datasets"]["hotpotqa-deep"]["moves"]
    assert move["displacement"] != 0 and set(move["shift"]) == {"cope", "ccpe"}
    assert move["shift"]["cope"] == pytest.approx(abs(move["displacement"]) / 2, rel=0.2)  # half a position a token
    assert move["shift"]["ccpe"] < 0.1 * move["shift"]["cope"] and move["unsaturated"] == {"cope": 1, "ccpe": 1}
    [row] = moves_table(load_run(config, prompts_cope=tmp_path / "p.json"))
    assert row["shift"]["cope"]["value"] == move["shift"]["cope"] and row["displacement"]["value"] > 0


def test_what_is_native_does_not_depend_on_the_adapter(config):
    without = {k: v for k, v in config.items() if k != "cope"}
    assert config_hash(native(config)) == config_hash(without) != config_hash(config)
    assert cope_systems(without) == []
