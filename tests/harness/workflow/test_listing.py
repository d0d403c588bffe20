"""The lines of `snakemake --list`, and the configuration that a target needs."""

from harness.inventory import read_config
from harness.plots.render import FIGURES
from harness.workflow.listing import absent, figure_line, line_of
from harness.workflow.steps import STEPS, steps_of
from tests.helpers.places import ROOT


def test_every_step_and_every_figure_has_a_line_of_its_own():
    lines = {step.name: line_of(step) for step in STEPS}
    assert all(line.endswith(".") and len(line) <= 120 for line in lines.values()), lines
    assert lines["fig04b"] == figure_line("fig04b") and lines["fig04b"].startswith("Figure 4b: ")
    figures = [figure_line(name) for name in FIGURES]
    assert all(figures) and len(set(figures)) == len(figures)


def test_a_target_of_another_configuration_names_it():
    smoke, cpu, vllm = (read_config(ROOT / f"config/{name}.yaml") for name in ("smoke", "cpu", "smoke-vllm"))
    lacking = dict(absent(smoke))
    assert lacking["fig04b"] == "fig04b is not part of run 'smoke': it needs --configfile config/cpu.yaml"
    assert not lacking.keys() & {step.name for step in steps_of(smoke)} and "agents" not in lacking
    assert dict(absent(cpu)) == {}
    without = dict(absent(vllm))
    assert without["cope"].endswith("it needs --configfile config/cpu.yaml or --configfile config/smoke.yaml")
    assert "agents" in without and "fig04a" in without and "report" not in without
