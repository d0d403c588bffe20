"""A function-calling agent in AutoGen's manner: an assistant proposes calls, an executor answers with results."""

from harness.agents.agent import Agent, describe
from harness.agents.calls import Call, Tool, ToolError, render
from harness.agents.tasks.functions import OPERATIONS, FunctionTask
from harness.agents.template import Slot, Template


class FunctionCalling(Agent):
    """Slots: system with the tools' descriptions, executor's last message (updated), history (fixed), job (updated).

    `grammar` "line" writes `add 1 2`, "json" writes `{"name": "add", "arguments": {...}}`.
    """

    name = "function_calling"
    template = Template(
        (
            Slot("system", "reuse"),
            Slot("executor", "recompute"),
            Slot("history", "reuse", grows=True),
            Slot("job", "recompute"),
            Slot("cue", "recompute"),
        )
    )

    def __init__(self, task: FunctionTask, grammar: str = "line") -> None:
        self.grammar = grammar
        super().__init__(task.id)
        self.task, self.right, self.message = task, 0, ""
        self.history: list[str] = []

    def make_tools(self) -> list[Tool]:
        arithmetic = [
            Tool(name, ("x", "y"), lambda x, y, f=function: str(f(number(x), number(y))))
            for name, function in OPERATIONS.items()
        ]
        get = Tool("get", ("first", "second"), self._get, about="what a name holds")
        return [get, *arithmetic, Tool("finish", ("x",), self._finish)]

    def slots(self):
        return {
            "system": "\nUse the tools . One call a turn ." + describe(list(self.tools.values())),
            "executor": f"\nExecutor: {self.message}" if self.message else "",
            "history": self.history,
            "job": f"\nJob: {self.task.jobs[min(self.at, len(self.task.jobs) - 1)].text}",
            "cue": "\nCall:",
        }

    def observe(self, call: Call, result: str, failed: bool) -> None:
        self.message = result
        self.history.append(f"\nAssistant: {render(call, self.tools, self.grammar)}\nExecutor: {result}")

    def score(self) -> float:
        return self.right / len(self.task.jobs)

    def _get(self, first: str, second: str) -> str:
        name = f"{first} {second}"
        if name not in self.task.registers:
            raise ToolError(f"no name {name}")
        return str(self.task.registers[name])

    def _finish(self, x: str) -> str:
        self.right += number(x) == self.task.jobs[self.at].result
        self.at += 1
        self.finished = self.at == len(self.task.jobs)
        return "job ended"


def number(text: str) -> int:
    """An integer of at most 12 digits; ToolError otherwise."""
    if len(text) > 13 or not text.removeprefix("-").isascii() or not text.removeprefix("-").isdigit():
        raise ToolError(f"{text[:20]!r} is not an integer of at most 12 digits")
    return int(text)
