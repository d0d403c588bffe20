"""CKSim against shift."""

from harness.step import step
from harness.study import step_similarity

s = snakemake
with step(s.log[0], s.rule):
    step_similarity(s.params.config, s.input.data, s.output[0], s.threads)
