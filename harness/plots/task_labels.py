"""Labels for the synthetic task of a figure's data, so that an adversarial test is not taken for real text."""

from collections.abc import Iterable

from harness.tasks.synthetic.world import MIXES

LEDGER = "ledger"


def task_of(name: str) -> str:
    """The task of a data set or mix: "stress task" or "ledger task"; empty for any other data."""
    mix = name.rpartition("-")[2]
    return "stress task" if mix in MIXES else "ledger task" if mix == LEDGER else ""


def of_task(title: str, names: Iterable[str | None]) -> str:
    """`title`, its first line followed by the tasks of the data sets or mixes `names`."""
    tasks = sorted({task for name in names if name and (task := task_of(name))})
    line, newline, rest = title.partition("\n")
    return f"{line} ({', '.join(tasks)}){newline}{rest}" if tasks else title
