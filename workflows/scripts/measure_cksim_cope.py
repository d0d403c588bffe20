"""CKSim against shift on the CoPE model."""

from harness.step import step
from harness.study_cope import step_cope_similarity

s = snakemake
with step(s.log[0], s.rule):
    step_cope_similarity(s.params.config, s.input.data, s.output[0], s.threads)
