"""MemGPT on a multi-session chat: a bounded persona memory written by the model, and an archive searched by it."""

from harness.agents.agent import Agent, describe
from harness.agents.calls import Call, Tool
from harness.agents.tasks.chat import ChatTask, ChatTurn
from harness.agents.template import Slot, Template


def message(turn: ChatTurn) -> str:
    """The message slot."""
    said = f"what is {turn.name} ?" if turn.kind == "ask" else f"{turn.name} is now {turn.value} ."
    return f"\nUser: {said}"


class MemGPT(Agent):
    """Slots: system, memory and recalled (updated), sessions and history (fixed), message (updated).

    Facts told by the user are shown for one turn and reach later prompts through the memory alone, as in MemGPT when
    its message queue is full. Memory beyond its capacity moves to the archive, oldest first.
    """

    name = "memgpt"
    template = Template(
        (
            Slot("system", "reuse"),
            Slot("memory", "recompute"),
            Slot("recalled", "recompute"),
            Slot("sessions", "reuse", grows=True),
            Slot("history", "reuse", grows=True),
            Slot("message", "recompute"),
            Slot("cue", "recompute"),
        )
    )

    def __init__(self, task: ChatTask) -> None:
        super().__init__(task.id)
        self.task, self.right = task, 0
        self.memory: dict[str, str] = {}
        self.archive: dict[str, str] = {}
        self.recalled = ""
        self.history: list[str] = []
        for name, value in task.persona:
            self._write(name, value)

    def make_tools(self) -> list[Tool]:
        return [
            Tool("reply", ("material", "mark"), self._reply),
            Tool("remember", ("first", "second", "material", "mark"), self._remember),
            Tool("recall", ("first", "second"), self._recall),
        ]

    def slots(self):
        turn = self.task.turns[min(self.at, len(self.task.turns) - 1)]
        return {
            "system": "\nTalk with the user . Keep what the user says ." + describe(list(self.tools.values())),
            "memory": "\nMemory:" + "".join(f" {n} is {v} ." for n, v in self.memory.items()),
            "recalled": self.recalled,
            "sessions": self.task.sessions,
            "history": self.history,
            "message": message(turn),
            "cue": "\nCall:",
        }

    def observe(self, call: Call, result: str, failed: bool) -> None:
        self.recalled = f"\nRecalled: {result}" if call.tool == "recall" else ""

    def score(self) -> float:
        return self.right / sum(t.kind == "ask" for t in self.task.turns)

    def _write(self, name: str, value: str) -> None:
        self.memory.pop(name, None)
        self.memory[name] = value
        self.archive.pop(name, None)
        while len(self.memory) > self.task.capacity:
            oldest = next(iter(self.memory))
            self.archive[oldest] = self.memory.pop(oldest)

    def _remember(self, first: str, second: str, material: str, mark: str) -> str:
        self._write(f"{first} {second}", f"{material} {mark}")
        if self.task.turns[self.at].kind == "tell":
            self._next("\nUser: keep this .\nAgent: kept .")
        return "kept"

    def _recall(self, first: str, second: str) -> str:
        name = f"{first} {second}"
        value = self.memory.get(name) or self.archive.get(name)
        return f"{name} is {value} ." if value else f"nothing about {name} ."

    def _reply(self, material: str, mark: str) -> str:
        turn, given = self.task.turns[self.at], f"{material} {mark}"
        if turn.kind == "ask":
            self.right += given == turn.value
            self._next(f"\nUser: what is {turn.name} ?\nAgent: {turn.name} is {given} .")
        else:
            self._next(f"\nUser: keep this .\nAgent: {given} .")
        return "sent"

    def _next(self, entry: str) -> None:
        self.history.append(entry)
        self.at += 1
        self.finished = self.at == len(self.task.turns)
