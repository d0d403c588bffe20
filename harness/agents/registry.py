"""The agents by name, with their tasks."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from cacheslide.errors import ConfigError
from harness.agents.agent import Agent
from harness.agents.completer import Completer
from harness.agents.function_calling import FunctionCalling
from harness.agents.loop import Episode, Stops, run_episode
from harness.agents.memgpt import MemGPT
from harness.agents.reflexion import Reflexion
from harness.agents.swe_agent import SWEAgent
from harness.agents.tasks import chat_tasks, fix_tasks, function_tasks, qa_tasks


@dataclass(frozen=True)
class Entry:
    """`tasks(split, seed, count, **options)` draws tasks, `agent(task, **options)` starts an episode on one."""

    title: str
    tasks: Callable[..., Iterator[Any]]
    agent: Callable[..., Agent]


AGENTS = {
    "reflexion": Entry("Reflexion", qa_tasks, Reflexion),
    "memgpt": Entry("MemGPT", chat_tasks, MemGPT),
    "swe_agent": Entry("SWE-Agent", fix_tasks, SWEAgent),
    "function_calling": Entry("Function calling", function_tasks, FunctionCalling),
}


def entry(name: str) -> Entry:
    """The agent called `name`."""
    if name not in AGENTS:
        raise ConfigError(f"unknown agent {name!r} (known: {', '.join(AGENTS)})")
    return AGENTS[name]


def run_tasks(
    name: str, tasks: Iterable[Any], completer: Completer, stops: Stops | None = None, **options: Any
) -> list[Episode]:
    """One episode a task, one after the other; `options` go to the agent."""
    out = []
    for task in tasks:
        with closing(entry(name).agent(task, **options)) as agent:
            out.append(run_episode(agent, completer, stops))
    return out
