"""One job of the study."""

from harness.step import step
from harness.workflow.perform import perform

s = snakemake
with step(s.log[0], s.rule):
    inputs = {name: value if isinstance(value, str) else list(value) for name, value in s.input.items()}
    perform(s.rule, s.params.config, inputs, list(s.output), s.threads)
