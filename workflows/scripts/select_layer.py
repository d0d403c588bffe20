"""The common selection layer, from validation data."""

from harness.experiments.study.steps import step_select_layer
from harness.step import step

s = snakemake
with step(s.log[0], s.rule):
    step_select_layer(s.params.config, list(s.input.data), s.output[0], s.threads)
