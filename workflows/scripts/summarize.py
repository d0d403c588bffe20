"""Tables, headline and provenance of a run, from its records."""

from harness.results.summary import summarize
from harness.step import step

s = snakemake
with step(s.log[0], s.rule):
    summarize(s.params.config, s.output[0], **dict(s.input.items()))
