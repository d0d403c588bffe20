"""report.html, from the summary and the figures."""

from harness.report.builder import build_report
from harness.step import step

s = snakemake
with step(s.log[0], s.rule):
    build_report(s.input.summary, list(s.input.figures), s.output[0])
