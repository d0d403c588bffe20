"""The study's table of steps: what a step may read, what Snakemake makes of it, what runs again, what is opened."""

import json
import tarfile
from copy import deepcopy

import pytest

from cacheslide.errors import ConfigError
from harness.configuration import check
from harness.inventory import read_config
from harness.results.provenance import ROOT, config_hash
from harness.results.runs import read_json
from harness.results.summary import own_hashes
from harness.workflow import perform as performing
from harness.workflow import reads
from harness.workflow.__main__ import SMALL, SMALL_AGENTS, undeclared_inputs
from harness.workflow.paths import inputs_of, jobs_of, only_tables, outputs_of, records_of, what_is_there
from harness.workflow.reruns import CHANGES, SCHEMA, changed, rules_rerun
from harness.workflow.slices import Slice, slice_of
from harness.workflow.steps import STEPS, Step, runs_alone, step_named, steps_of

pytestmark = pytest.mark.slow

CONFIGS = ("smoke", "smoke-ledger", "ledger", "cpu", "smoke-vllm", "gpu")


def config(name: str = "cpu") -> dict:
    found = read_config(ROOT / f"config/{name}.yaml")
    check(found, SCHEMA)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_every_input_is_made_by_a_step_before_it_or_lies_in_the_tree(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    made: set[str] = set()
    for job in jobs_of(config(name)):
        for given in job.inputs.values():
            for path in [given] if isinstance(given, str) else given:
                assert path in made or path.startswith("models/") or path.startswith(str(ROOT)), (job.step.name, path)
        assert not made & set(job.outputs)  # no file is made twice
        made |= set(job.outputs)


def test_every_step_names_keys_that_configurations_have():
    keys = {key for name in CONFIGS for key in _keys(config(name))}
    for step in STEPS:
        assert set(step.reads) <= keys | {"*"}, step.name
    assert len({step.name for step in STEPS}) == len(STEPS)


def _keys(values: dict, above: str = "") -> set[str]:
    own = {f"{above}{key}" for key in values}
    return own.union(*(_keys(v, f"{above}{k}.") for k, v in values.items() if isinstance(v, dict)), set())


def test_a_slice_holds_what_was_asked_for_and_empty_systems_mean_the_runs():
    whole = config()
    whole["latency"]["systems"], whole["agents"]["replay"]["systems"] = [], []
    part = slice_of(whole, ("seed", "latency.repeats", "latency.systems", "agents.replay", "vllm"))
    assert part["latency"] == {"repeats": 3, "systems": whole["systems"]}
    assert part["agents"] == {"replay": whole["agents"]["replay"] | {"systems": whole["agents"]["systems"]}}
    assert set(part) == {"seed", "latency", "agents"} and whole["latency"]["systems"] == []
    part["latency"]["systems"].append("x")
    assert "x" not in whole["systems"]


def test_a_key_that_is_read_and_not_declared_is_named():
    whole = config()
    part = Slice(slice_of(whole, ("seed", "vllm", "latency.repeats")), ("seed", "vllm", "latency.repeats"))
    assert part["seed"] == 0 and part.get("vllm", {}) == {} and part["latency"]["repeats"] == 3
    assert json.loads(json.dumps(part)) == {"seed": 0, "latency": {"repeats": 3}}
    for read in (
        lambda: part["dtype"],
        lambda: part.get("backend", "reference"),
        lambda: "cope" in part,
    ):
        with pytest.raises(ConfigError, match="does not declare it"):
            read()
    with pytest.raises(ConfigError, match=r"the key latency\.warmups of"):
        part["latency"]["warmups"]


def test_a_step_gets_no_more_than_its_slice(tmp_path, monkeypatch):
    """The real step with one key taken out of its declaration ends with that key's name."""
    step = step_named("generate_accuracy")
    less = Step(step.name, step.call, ("seed", "accuracy.prompts"), outputs=step.outputs, each=step.each)
    out = str(tmp_path / "accuracy/hotpotqa-deep.jsonl")
    whole = changed(config("smoke"), "accuracy.prompts", 1)
    performing.perform(step.name, slice_of(whole, step.reads), {}, [out], 1)
    monkeypatch.setattr(performing, "step_named", lambda name: less)
    with pytest.raises(ConfigError, match=r"accuracy\.tokens"):
        performing.perform(step.name, slice_of(whole, less.reads), {}, [out], 1)


def test_records_of_a_slice_are_the_configurations_own():
    whole, other = config(), changed(config(), "latency.repeats", 9)
    latency, accuracy = step_named("measure_latency").reads, step_named("evaluate").reads
    assert config_hash(slice_of(whole, latency)) in own_hashes(whole) - own_hashes(other)
    assert config_hash(slice_of(whole, accuracy)) in own_hashes(whole) & own_hashes(other)


def test_older_records_of_a_configuration_are_its_own():
    """Those of results/cpu, made before slices and before two keys were renamed, apart from two older runs' records."""
    conditions = read_json(ROOT / "results/cpu/summary.json")["conditions"]
    made, others = conditions["record_config_hashes"], conditions["records_of_other_configs"]
    assert len(others) == 2 and set(made) - own_hashes(config()) == set(others)


def test_what_a_configuration_leaves_out_no_step_asks_for():
    small = config("smoke-vllm")
    names = {step.name for step in steps_of(small)}
    assert not names & {"build_chunks", "measure_cksim", "evaluate_cope", "record_agents", "fig04a", "fig11"}
    inputs = inputs_of(step_named("evaluate"), small, {"dataset": "hotpotqa-deep"})
    assert set(inputs) == {"model", "data", "layer"}
    assert outputs_of(step_named("evaluate"), small)[0] == "results/smoke-vllm/accuracy/{dataset}/recompute.jsonl"


def test_tables_are_made_of_what_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    whole = config()
    for name in ("prompts.json", "equal_share/swebench-deep/epic.jsonl"):
        path = tmp_path / "results/cpu" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    steps = only_tables(whole)
    assert [step.name for step in steps] == ["summarize", "fig03", "fig05", "fig10", "report"]
    inputs = what_is_there(inputs_of(steps[0], whole, {}), steps, whole)
    assert set(inputs) == {"model", "prompts", "equal_share"}
    assert inputs["equal_share"] == ["results/cpu/equal_share/swebench-deep/epic.jsonl"]


def test_the_packed_records_are_those_of_the_committed_run():
    with tarfile.open(ROOT / "results/cpu/records.tar.xz") as archive:
        packed = {f"results/cpu/{m.name}" for m in archive.getmembers() if m.isfile()}
    records = set(records_of(config()))
    assert packed <= records
    assert {path.split("/")[2] for path in records - packed} <= {"equal_share"}  # two data sets were not run again


SAME = "fig10 report summarize"  # the summary holds the configuration, and these are made of it
RERUNS = {
    "model": "build_chunks equal_share evaluate evaluate_cope fig03 fig04a fig05 measure_cksim measure_cksim_cope "
    "measure_latency measure_prompts measure_prompts_cope measure_throughput select_layer throughput",
    "systems": "build_chunks equal_share evaluate fig03 fig05 measure_prompts",
    "accuracy.prompts": "build_chunks equal_share evaluate evaluate_cope fig03 fig05 generate_accuracy measure_prompts "
    "measure_prompts_cope",
    "accuracy.questions": "build_chunks equal_share evaluate evaluate_cope",
    "latency.repeats": "measure_latency",
    "latency.tokens": "generate_latency measure_latency",
    "throughput.batches": "measure_throughput throughput",
    "cope.prompts": "evaluate_cope",
    "agents.load.repeats": "fig11 measure_agents_load",
}


@pytest.mark.slow
def test_a_changed_key_runs_those_rules_again_that_read_it():
    found = rules_rerun({key: CHANGES[key] for key in RERUNS})
    assert found == {key: sorted(f"{rules} {SAME}".split()) for key, rules in RERUNS.items()}


@pytest.mark.slow
def test_no_step_opens_a_file_that_it_does_not_declare(monkeypatch):
    """The small study is run; one step has lost an input, and that one is seen."""

    def forgetful(config):
        for job in jobs_of(config):
            if job.step.name == "fig05":
                job.inputs.pop("cope")
            yield job

    monkeypatch.setattr(reads, "jobs_of", forgetful)
    assert undeclared_inputs() == {"fig05": ["results/small/prompts_cope.json"]}


def test_the_small_study_has_a_step_of_every_kind():
    small = deepcopy(config("smoke")) | SMALL | {"agents": SMALL_AGENTS}
    check(small, SCHEMA)
    kinds = {step.call for step in STEPS}
    assert {step.call for step in steps_of(small)} == kinds


@pytest.mark.parametrize("change, alone", [({}, False), ({"device": "cuda"}, True), ({"backend": "vllm"}, True)])
def test_nothing_runs_beside_a_timing_or_on_a_gpu(change, alone):
    whole = config() | change
    timed = {step.name for step in STEPS if step.timed}
    assert {"measure_latency", "measure_throughput", "measure_agents_load"} <= timed
    assert all(runs_alone(step, whole) for step in STEPS if step.timed)
    assert runs_alone(step_named("evaluate"), whole) == runs_alone(step_named("build_chunks"), whole) == alone
    assert not runs_alone(step_named("report"), whole)
