"""Configurations beyond their schema: backends, defaults, and the prompt files of a study."""

import pytest
import yaml

from cacheslide.errors import ConfigError, PolicyError
from cacheslide.policies.registry import load_policy, policy_names
from cacheslide.vllm.options import policy_of
from harness.backends.in_process import EngineOptions
from harness.backends.vllm import annotated_as
from harness.configuration import check
from harness.experiments.study import steps as study
from harness.inventory import FIGURES, data_spec, figures_of
from harness.plots import render
from harness.systems import VANILLA, recipes, resolve, scalable
from harness.workflow.paths import jobs_of, outputs_of
from harness.workflow.steps import steps_of
from tests.helpers.places import ROOT

SCHEMA = ROOT / "workflows/schemas/config.schema.yaml"


def config(name: str = "smoke", **changes) -> dict:
    return yaml.safe_load((ROOT / f"config/{name}.yaml").read_text()) | changes


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("smoke", {"vllm": {}}, "vllm: these keys need backend: vllm"),
        ("smoke", {"systems": ["recompute", "vllm"]}, "'vllm' is vLLM itself and needs backend: vllm"),
        (
            "smoke",
            {"backend": "vllm"},
            "store_dtype: backend: vllm keeps chunks in the model's dtype; set",
        ),
        ("smoke", {"backend": "sglang"}, "backend: 'sglang' is not one of"),
        ("smoke-vllm", {"vllm": {"block_sise": 32}}, "vllm: unknown key block_sise"),
        ("smoke-vllm", {"vllm": {"block_size": 48}}, "vllm.block_size: 48 must be a multiple of 32"),
        ("smoke-vllm", {"vllm": {"store_device": "disk"}}, "vllm.store_device: 'disk' is not one of"),
        ("smoke-vllm", {"systems": ["recompute", "vllm_v0"]}, "unknown system 'vllm_v0'; installed are .*vllm_prefix"),
    ],
)
def test_what_a_backend_cannot_do_is_refused_with_the_reason(name, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        check(config(name, **changes), SCHEMA)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"datasets": ["hotpotqa-ledgers"]}, "accuracy: unknown synthetic data set 'hotpotqa-ledgers'"),
        ({"accuracy": {"prompts": 1, "tokens": 768}}, "accuracy: ledger prompts have 800 to 8300 tokens, not 768"),
        ({"latency": {"dataset": "hotpotqa-ledger", "tokens": [2048, 9000], "prompts": 1}}, "latency: .*, not 9000"),
    ],
)
def test_data_that_cannot_be_drawn_is_refused_before_anything_runs(changes, reason):
    found = config("smoke-ledger") | changes
    for part in ("latency", "throughput", "cksim"):
        found[part] |= {"dataset": found["datasets"][0]}
    with pytest.raises(ConfigError, match=reason):
        check(found, SCHEMA)


def test_defaults_are_filled_in_and_are_those_of_the_engine():
    found = config("smoke-vllm")
    given = dict(found["vllm"])
    found["vllm"] = {}
    del found["seed"], found["accuracy"]["questions"]
    check(found, SCHEMA)
    assert EngineOptions(**found["vllm"]) == EngineOptions()
    assert (found["seed"], found["accuracy"]["questions"]) == (0, 8)
    assert given.items() > {"enforce_eager": True}.items()
    plain = config()
    check(plain, SCHEMA)
    assert "vllm" not in plain  # its hash does not depend on a backend that it does not use


def test_any_configuration_runs_on_vllm():
    for name in ("smoke", "cpu", "gpu", "checkpoint"):
        found = config(name, backend="vllm")
        found["store_dtype"] = found["dtype"]
        check(found, SCHEMA)
        assert figures_of(found) == [f for f in FIGURES if f != "fig04a"]
        assert not [path for step in steps_of(found) for path in outputs_of(step, found) if "cksim" in path]


def test_prompt_files_name_every_part_once():
    found = config()
    check(found, SCHEMA)
    steps = [step for step in steps_of(found) if step.name.startswith("generate_")]
    files = [path for job in jobs_of(found, steps) for path in job.outputs]
    assert len(files) == len(set(files)) == 2 * len(found["datasets"]) + 2 + len(found["latency"]["tokens"])
    assert data_spec(found, "latency-4096") == {"split": "test", "prompts": 2, "tokens": 4096}
    assert data_spec(found, "throughput") == {"split": "test", "prompts": 8, "tokens": 768}
    assert data_spec(found, "validation")["split"] == "validation"
    assert set(FIGURES) <= set(render.FIGURES)  # others are drawn from benchmarks, not from a run


def test_cksim_and_chunk_files_say_that_they_are_the_reference_backends():
    found = config("smoke-vllm", cksim={"shifts": [0]})
    with pytest.raises(ConfigError, match="CKSim reads the KV of every layer"):
        study.step_similarity(found, "absent.jsonl", "absent.jsonl", 1)
    with pytest.raises(ConfigError, match="built inside the engine"):
        study.step_chunks(found, "absent.jsonl", 1, "absent", 1)


@pytest.mark.parametrize("layer", [None, 1, 3])
@pytest.mark.parametrize("recompute_ratio", [None, 0.26, 1.0])
def test_annotations_ask_for_exactly_the_policy_that_is_meant(layer, recompute_ratio):
    for policy in resolve(policy_names(), layer=layer, recompute_ratio=recompute_ratio):
        annotations = annotated_as(policy)
        asked = policy_of(annotations.pop("policy"), **annotations)
        assert (asked.name, asked.correction) == (policy.name, policy.correction)


def test_what_annotations_cannot_say_is_refused():
    from dataclasses import replace

    policy = load_policy("cacheslide")
    odd = replace(policy, correction=replace(policy.correction, metric="v"))
    with pytest.raises(PolicyError, match="a request cannot ask for"):
        annotated_as(odd)


def test_vllm_by_itself_reads_no_chunk_caches_and_scales_with_nothing():
    systems = resolve(["recompute", *VANILLA, "cacheslide"], layer=2, recompute_ratio=0.5)
    assert [s.name for s in systems] == ["recompute", "vllm", "vllm_prefix_cache", "cacheslide"]
    assert list(recipes(systems)) == ["fixedchain_fixed_chain"]
    assert scalable([*VANILLA, "cacheslide"]) == ["cacheslide"]
