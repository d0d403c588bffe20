"""Reusable share and moves of the prompts."""

from harness.experiments.study.steps import step_prompts
from harness.step import step

s = snakemake
with step(s.log[0], s.rule):
    traces = s.input.get("traces")
    step_prompts(s.params.config, list(s.input.data), s.output[0], traces and str(traces))
