"""Every system answers the questions of one data set."""

from harness.experiments.study.steps import selected_layer, step_accuracy
from harness.step import step

s = snakemake
with step(s.log[0], s.rule):
    layer = selected_layer(s.input.layer)
    share = s.params.get("share")
    step_accuracy(s.params.config, s.input.data, s.input.get("chunks"), layer, list(s.output), s.threads, share)
