"""Which synthetic task data are of, as figures say it: an adversarial test must not pass for a picture of real text."""

from collections.abc import Iterable

from harness.tasks.synthetic.world import MIXES

LEDGER = "ledger"


def task_of(name: str) -> str:
    """The task of a data set or mix: "stress task" or "ledger task"; empty for any other data."""
    mix = name.rpartition("-")[2]
    return "stress task" if mix in MIXES else "ledger task" if mix == LEDGER else ""


def of_task(title: str, names: Iterable[str | None]) -> str:
    """`title`, its first line followed by the tasks that the data sets or mixes `names` are of."""
    tasks = sorted({task for name in names if name and (task := task_of(name))})
    line, newline, rest = title.partition("\n")
    return f"{line} ({', '.join(tasks)}){newline}{rest}" if tasks else title
