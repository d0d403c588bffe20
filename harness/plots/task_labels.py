"""Labels for the synthetic task of a figure's data, so that an adversarial test is not taken for real text."""

from collections.abc import Iterable

from harness.inventory import AGENT_NAMES
from harness.results.runs import RecordFile
from harness.tasks.synthetic.world import MIXES

LEDGER = "ledger"


def task_of(name: str) -> str:
    """The task of a data set, mix, trace ("deep@4") or agent: "stress task" or "ledger task"; "" for any other data.

    The agents' tasks (`harness/agents/tasks`) are drawn from the stress task's worlds.
    """
    mix = name.partition("@")[0].rpartition("-")[2]
    return "stress task" if mix in MIXES or name in AGENT_NAMES else "ledger task" if mix == LEDGER else ""


def of_task(title: str, names: Iterable[str | None]) -> str:
    """`title`, its first line followed by the tasks of the data sets, mixes, traces or agents `names`."""
    tasks = sorted({task for name in names if name and (task := task_of(name))})
    line, newline, rest = title.partition("\n")
    return f"{line} ({', '.join(tasks)}){newline}{rest}" if tasks else title


def agents_in(file: RecordFile) -> list[str]:
    """The agents whose episodes a record file is about, by its settings and its records."""
    return sorted({*file.settings.get("tasks", ()), *(r["agent"] for r in file.records if "agent" in r)})
