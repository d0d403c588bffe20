"""Processes of which each does one piece of work, so that nothing that it leaves behind changes the next one's."""

from multiprocessing import get_context
from multiprocessing.pool import Pool

# Imported once, in a process that does nothing else; every piece of work begins with a copy of it.
IMPORTED = [
    "snakemake.cli",
    "harness.experiments.agents.steps",
    "harness.experiments.cope.steps",
    "harness.experiments.real.plan",
    "harness.experiments.study.steps",
    "harness.plots.render",
    "harness.report.builder",
    "harness.results.summary",
    "harness.workflow.paths",
]


def processes(count: int) -> Pool:
    """`count` processes at a time; a context manager."""
    context = get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context.Pool(count, maxtasksperchild=1)
