"""One figure, from a result file."""

from harness.plots.render import render
from harness.step import step

s = snakemake
with step(s.log[0], s.rule):
    render(s.params.figure, s.input[0], list(s.output))
