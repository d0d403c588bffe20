"""Every system answers the questions of one data set."""

from harness.experiments.study.steps import selected_layer, step_accuracy
from harness.step import step

s = snakemake
with step(s.log[0], s.rule):
    layer = selected_layer(s.input.layer)
    recompute_ratio = s.params.get("recompute_ratio")
    step_accuracy(
        s.params.config, s.input.data, s.input.get("chunks"), layer, list(s.output), s.threads, recompute_ratio
    )
