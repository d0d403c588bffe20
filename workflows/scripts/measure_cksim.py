"""CKSim against shift."""

from harness.experiments.study.steps import step_similarity
from harness.step import step

s = snakemake
with step(s.log[0], s.rule):
    step_similarity(s.params.config, s.input.data, s.output[0], s.threads)
