"""What counts as an input of a step, and what as code."""

import sys
from pathlib import Path

import pytest

from harness.results.provenance import ROOT
from harness.workflow.reads import is_code


@pytest.mark.parametrize(
    "path",
    [
        ROOT / "harness/step.py",
        ROOT / "harness/report/report.html.j2",
        ROOT / ".git/HEAD",
        ROOT / "cacheslide.egg-info/entry_points.txt",
        ROOT / "site/x-1.dist-info/entry_points.txt",
        Path(sys.prefix) / "share/data.csv",
    ],
)
def test_code_and_what_is_installed_are_no_inputs(path):
    assert is_code(path)


@pytest.mark.parametrize("name", ["results/cpu/summary.json", "models/x/model.safetensors", "config/cpu.yaml"])
def test_data_in_the_checkout_is_an_input(name):
    assert not is_code(ROOT / name)
