"""Reflexion on multi-hop questions: answer, get feedback that it was wrong, reflect, retry (HotPotQA in the paper)."""

from harness.agents.agent import Agent, describe
from harness.agents.calls import Call, Tool
from harness.agents.tasks.qa import QATask, statement_about
from harness.agents.template import Slot, Template

TRIALS = 3


def asked(name: str) -> str:
    """The question slot."""
    return f"\nQuestion: what is {name} ?"


def judged_wrong(given: str, changed: str, now: str) -> str:
    """The judge's feedback: a changed root and its new value, "" when the notes are right."""
    return f"\nFeedback: {given} is wrong . " + (f"{changed} is now {now} ." if changed else "Try again .")


class Reflexion(Agent):
    """Slots: system, notes and reflections (updated), documents and history (fixed), question and feedback (updated).

    Feedback is shown once, to the step that follows it. Only the text that the model writes with `reflect` is kept.
    """

    name = "reflexion"
    template = Template(
        (
            Slot("system", "reuse"),
            Slot("notes", "recompute"),
            Slot("reflections", "recompute"),
            Slot("documents", "reuse", grows=True),
            Slot("history", "reuse", grows=True),
            Slot("question", "recompute"),
            Slot("feedback", "recompute"),
            Slot("cue", "recompute"),
        )
    )

    def __init__(self, task: QATask) -> None:
        super().__init__(task.id)
        self.task, self.trial, self.right = task, 0, 0
        self.reflections: dict[str, str] = {}
        self.history: list[str] = []
        self.feedback = self._pending_feedback = ""
        self.trials: list[int] = []

    def make_tools(self) -> list[Tool]:
        return [
            Tool("answer", ("material", "mark"), self._answer),
            Tool("reflect", ("first", "second", "material", "mark"), self._reflect),
            Tool("lookup", ("first", "second"), self._lookup),
        ]

    def slots(self):
        reflections = "".join(f"\nReflection: {name} is {value} ." for name, value in self.reflections.items())
        return {
            "system": "\nAnswer the question . After a wrong answer reflect ." + describe(list(self.tools.values())),
            "notes": self.task.notes,
            "reflections": reflections,
            "documents": self.task.documents,
            "history": self.history,
            "question": asked(self.task.questions[min(self.at, len(self.task.questions) - 1)].name),
            "feedback": self.feedback,
            "cue": "\nCall:",
        }

    def observe(self, call: Call, result: str, failed: bool) -> None:
        self.feedback, self._pending_feedback = self._pending_feedback, ""
        if call.tool == "lookup":
            self.history.append(f"\nLookup: {' '.join(call.args)} : {result}")

    def score(self) -> float:
        return self.right / len(self.task.questions)

    def _answer(self, material: str, mark: str) -> str:
        question, given = self.task.questions[self.at], f"{material} {mark}"
        self.trial += 1
        right = given == question.answer
        if right:
            self.right += 1
        elif self.trial < TRIALS:
            self._pending_feedback = judged_wrong(given, question.changed, question.now)
            return "wrong"
        self.history.append(f"\nQuestion: what is {question.name} ?\nAnswer: {question.name} is {given} .")
        self.trials.append(self.trial)
        self.at, self.trial = self.at + 1, 0
        self.finished = self.at == len(self.task.questions)
        return "right" if right else "wrong"

    def _reflect(self, first: str, second: str, material: str, mark: str) -> str:
        self.reflections.pop(f"{first} {second}", None)
        self.reflections[f"{first} {second}"] = f"{material} {mark}"
        return "noted"

    def _lookup(self, first: str, second: str) -> str:
        return statement_about(self.task.documents, f"{first} {second}")
