"""A Snakemake run that was killed: its lock stays, goes with one command, and what was finished is not done again."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.places import ROOT
from tests.helpers.waiting import eventually

pytestmark = pytest.mark.slow

SNAKEFILE = """
rule all:
    input: "second"

rule first:
    output: "first"
    shell: "echo first >> done; touch {output}"

rule second:
    input: "first"
    output: "second"
    shell: "echo second >> done; touch {output}; if [ ! -e again ]; then touch waiting; sleep 600; fi"
"""


def snakemake(folder: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "snakemake", "--profile", str(ROOT / "profiles/default"), *options]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, "--cores", "1"], cwd=folder, start_new_session=True, **streams)


def unlock(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/stale_lock.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
@pytest.mark.fault("snakemake_lock")
def test_a_killed_run_goes_on(tmp_path):
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    assert unlock(tmp_path).returncode == 0  # nothing to remove
    run = snakemake(tmp_path)
    assert eventually((tmp_path / "waiting").exists, 120)
    refused = unlock(tmp_path)
    assert refused.returncode == 2 and f"process {run.pid}" in refused.stderr and refused.stderr.count("\n") == 1
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    (tmp_path / "again").touch()
    locked = snakemake(tmp_path)
    assert "cannot be locked" in locked.communicate(timeout=120)[1] and locked.returncode
    removed = unlock(tmp_path)
    assert removed.returncode == 0 and "killed is removed" in removed.stderr
    again = snakemake(tmp_path)
    assert again.communicate(timeout=120) and again.returncode == 0
    assert (tmp_path / "done").read_text().split() == ["first", "second", "second"]  # the torn step alone is repeated


def test_the_readme_says_how_to_go_on():
    assert "snakemake --unlock" in (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    runs = [line for line in makefile.splitlines() if line.startswith("\t$(SNAKEMAKE) --configfile")]
    assert runs and all("$(BIN)/python scripts/stale_lock.py" in makefile[: makefile.index(r)][-200:] for r in runs)
