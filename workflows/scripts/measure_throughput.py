"""Requests a second of every system and batch."""

from harness.experiments.study.steps import selected_layer, step_throughput
from harness.step import step

s = snakemake
with step(s.log[0], s.rule):
    layer = selected_layer(s.input.layer)
    step_throughput(s.params.config, s.input.data, layer, s.output[0], s.threads)
