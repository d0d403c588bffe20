"""One section of `agents:`."""

from harness.experiments.agents.steps import step_agents
from harness.step import step

s = snakemake
with step(s.log[0], s.rule):
    traces = s.input.get("traces")
    step_agents(s.params.config, s.params.section, s.output[0], s.threads, traces and str(traces))
