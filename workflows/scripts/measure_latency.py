"""Time to first token of every system at one prompt length."""

from harness.experiments.study.steps import selected_layer, step_latency
from harness.step import step

s = snakemake
with step(s.log[0], s.rule):
    layer = selected_layer(s.input.layer)
    step_latency(s.params.config, s.input.data, layer, s.output[0], s.threads)
