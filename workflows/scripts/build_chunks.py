"""Chunk KV caches of one data set."""

from harness.experiments.study.steps import selected_layer, step_chunks
from harness.step import step

s = snakemake
with step(s.log[0], "build_chunks"):
    layer = selected_layer(s.input.layer)
    step_chunks(s.params.config, s.input.data, layer, s.output[0], s.threads)
