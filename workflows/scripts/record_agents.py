"""Recorded episodes of every agent."""

from harness.experiments.agents.steps import step_traces
from harness.step import step

s = snakemake
with step(s.log[0], s.rule):
    step_traces(s.params.config, s.output[0])
