"""The common selection layer, from validation data."""

from harness.step import step
from harness.study import step_select_layer

s = snakemake
with step(s.log[0], s.rule):
    step_select_layer(s.params.config, list(s.input.data), s.output[0], s.threads)
