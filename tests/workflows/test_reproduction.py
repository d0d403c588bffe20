"""The workflow's target `reproduce-all` with a configuration of GPUs: a rule a stage, tables and figure behind them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.experiments.serving.reproduction.settings import read_settings
from harness.experiments.serving.reproduction.stages import plan
from tests.helpers.places import ROOT

pytestmark = pytest.mark.slow


def planned(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A dry run in a folder without results."""
    (folder / "config").mkdir(exist_ok=True)
    (folder / "config/smoke.yaml").write_text((ROOT / "config/smoke.yaml").read_text())
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder)]
    command += ["--cores", "2", "--workflow-profile", "none", "--nolock", "--dry-run", "-p", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_every_stage_is_a_rule_that_ends_in_time(tmp_path):
    file = ROOT / "config/h200-x2.yaml"
    other = tmp_path / "results/h200/reproduction"
    other.mkdir(parents=True)
    (other / "01-engine.jsonl").write_text("")
    done = planned(tmp_path, "reproduce-all", "--configfile", str(file))
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    count = dict(re.findall(r"^(\S+) +(\d+)$", text, re.MULTILINE))
    made = plan(read_settings(file))
    assert {f"gpu_stage_{s.number}" for s in made.stages} < count.keys()
    assert count["reproduction_tables"] == count["reproduction"] == "1" and "evaluate" not in count
    for stage in made.stages:
        assert f"--stage {stage.number} --minutes 9.0 --out results/h200-x2/reproduction" in text
    assert "--records results/h200-x2/reproduction results/h200/reproduction" in text


@pytest.mark.parametrize(
    ("text", "arguments", "line"),
    [
        ("run: x\nshape: gpt\n", [], "shape: 'gpt' is not one of mistral-7b, llama-70b"),
        ("run: x\nmodel: nowhere\n", [], "model: nowhere/config.json cannot be read"),
        ("run: x\nshape: mistral-7b\n", ["--config", "repeats=3"], "--config changes no key of a reproduction"),
    ],
)
def test_a_wrong_configuration_is_one_line(tmp_path, text, arguments, line):
    (tmp_path / "own.yaml").write_text(text)
    done = planned(tmp_path, "reproduce-all", *arguments, "--configfile", str(tmp_path / "own.yaml"))
    assert done.returncode == 2
    [reason] = [x for x in done.stderr.splitlines() if x.startswith("config: ")]
    assert reason.startswith(f"config: {line}")
