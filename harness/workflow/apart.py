"""Pools of processes that each do one piece of work, so that no state is carried to the next one."""

from multiprocessing import get_context
from multiprocessing.pool import Pool

# Imported once in the server process, from which every worker is forked.
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
    """A pool of `count` processes; a context manager."""
    context = get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context.Pool(count, maxtasksperchild=1)
