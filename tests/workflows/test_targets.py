"""Targets as a user meets them: a list with a line each, and the configuration that one needs."""

import re
import subprocess
import sys

import pytest

from tests.helpers.places import ROOT

pytestmark = pytest.mark.slow


def snakemake(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakemake", "--nolock", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_every_target_is_listed_with_a_line():
    done = snakemake("--list")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) > 50, done.stderr
    assert [line for line in lines if not re.fullmatch(r"[\w-]+ \(.+\)", line)] == []
    names = {line.split()[0] for line in lines}
    assert {"smoke", "fig04b", "fig12a", "serving", "real", "reproduce-all", "real-slice"} <= names


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("fig04b",), "fig04b is not part of run 'smoke': it needs --configfile config/cpu.yaml"),
        (
            ("cope", "--configfile", "config/smoke-vllm.yaml"),
            "cope is not part of run 'smoke-vllm': it needs --configfile config/cpu.yaml or --configfile "
            "config/smoke.yaml",
        ),
    ],
)
def test_a_target_without_its_configuration_says_which_one_it_needs(arguments, line):
    done = snakemake("-n", *arguments)
    assert done.returncode == 2 and f"config: {line}" in done.stderr.splitlines() and "Traceback" not in done.stderr
