"""The systems on the CoPE model answer the questions of one data set."""

from harness.step import step
from harness.study import selected_layer
from harness.study_cope import step_cope_accuracy

s = snakemake
with step(s.log[0], s.rule):
    step_cope_accuracy(s.params.config, s.input.data, selected_layer(s.input.layer), list(s.output), s.threads)
