"""Recorded episodes of every agent."""

from harness.step import step
from harness.study_agents import step_traces

s = snakemake
with step(s.log[0], s.rule):
    step_traces(s.params.config, s.output[0])
