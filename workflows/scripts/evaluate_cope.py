"""The systems on the CoPE model answer the questions of one data set."""

from harness.experiments.cope.steps import step_cope_accuracy
from harness.experiments.study.steps import selected_layer
from harness.step import step

s = snakemake
with step(s.log[0], s.rule):
    step_cope_accuracy(s.params.config, s.input.data, selected_layer(s.input.layer), list(s.output), s.threads)
