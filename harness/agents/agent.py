"""An agent: a template, tools, and a state that turns the model's own output into the next turn's update."""

from abc import ABC, abstractmethod

from harness.agents.calls import Call, Tool, parse
from harness.agents.template import Slots, Template
from harness.tasks.example import TextSegment


class Agent(ABC):
    """One episode of one agent on one task. Subclasses hold the state and define the slots and the tools.

    Attributes
    ----------
    name : str
        "reflexion", "memgpt", "swe_agent" or "function_calling".
    template : Template
        Its last slot is named "cue": updated text that the model's output follows.
    grammar : str
        How calls are written, see `harness.agents.calls.parse`.
    finished : bool
        Set by a tool: the agent is done and `score` is final.
    solved_by : str
        What decides `score`: "tests" that ran, comparison with a gold "patch" or "answer", or the "task"'s own rules.
    at : int
        Index of the current question, message or job: repeated calls are counted only within one.
    """

    name: str
    template: Template
    grammar = "line"
    solved_by = "task"

    def __init__(self, task_id: str) -> None:
        self.task_id = task_id
        self.finished, self.at = False, 0
        self.complaint = ""
        self.tools: dict[str, Tool] = {t.name: t for t in self.make_tools()}

    @abstractmethod
    def make_tools(self) -> list[Tool]:
        """The tools; their functions can change the agent's state."""

    @abstractmethod
    def slots(self) -> Slots:
        """This turn's text of every slot."""

    @abstractmethod
    def observe(self, call: Call, result: str, failed: bool) -> None:
        """Update the state with a tool's result."""

    @abstractmethod
    def score(self) -> float:
        """The share of the task that is solved, in [0, 1]; 1.0 is success."""

    def prompt(self) -> tuple[TextSegment, ...]:
        """This turn's segments. The error of a rejected output is an updated segment before the cue."""
        values = dict(self.slots())
        if self.complaint:
            values["cue"] = f"\nError: {self.complaint}{values['cue']}"
        return self.template.render(values)

    def parse(self, output: str) -> Call:
        """The call in the model's output; MalformedCall when there is none."""
        return parse(output, self.tools, self.grammar)

    def close(self) -> None:
        """Release the episode's resources (a worktree)."""
        return None


def describe(tools: list[Tool]) -> str:
    """The tools as text of the system prompt."""
    return "".join(f"\n{t.usage}" + (f" : {t.about}" if t.about else "") for t in tools)
