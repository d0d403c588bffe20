"""CKSim against shift on the CoPE model."""

from harness.experiments.cope.steps import step_cope_similarity
from harness.step import step

s = snakemake
with step(s.log[0], s.rule):
    step_cope_similarity(s.params.config, s.input.data, s.output[0], s.threads)
