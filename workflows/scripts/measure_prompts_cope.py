"""Moves of position indices on the CoPE model."""

from harness.experiments.cope.steps import step_cope_prompts
from harness.step import step

s = snakemake
with step(s.log[0], s.rule):
    step_cope_prompts(s.params.config, list(s.input.data), s.output[0], s.threads)
