"""Agents on real data: Reflexion over a question's paragraphs, and a small one that reads documents one by one.

Both use the rows loaded by `harness.tasks`. Their outputs are free text, so calls take the rest of a line.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

from cacheslide.errors import DataError
from harness.agents.agent import Agent, describe
from harness.agents.calls import Call, MalformedCall, Tool
from harness.agents.reflexion import TRIALS, Reflexion
from harness.agents.template import Slot, Template
from harness.scoring import compared_as, score
from harness.tasks.example import TaskExample

WINDOW = 40  # lines per tool result
WORD = re.compile(r"[A-Za-z0-9_]+")
COMMAND = re.compile(r"\b(open|search)\s+([^\n]+)")
ASK = "\nWrite the next command: open NAME or search WORDS.\nCommand: "


class Library:
    """Documents by name, ranked by BM25."""

    def __init__(self, documents: dict[str, str]) -> None:
        self.documents = documents
        self.counts = {name: _words(text) for name, text in documents.items()}
        self.length = sum(c.total() for c in self.counts.values()) / max(1, len(documents))
        self.holding = Counter(word for count in self.counts.values() for word in count)

    def rank(self, query: str, without: Sequence[str] = ()) -> list[str]:
        """Names, best first; documents of equal score keep their order."""
        asked = _words(query)
        return sorted((n for n in self.documents if n not in without), key=lambda n: -self._score(n, asked))

    def _score(self, name: str, asked: Counter[str], k: float = 1.2, b: float = 0.75) -> float:
        count, total = self.counts[name], len(self.documents)
        norm = k * (1 - b + b * count.total() / max(1.0, self.length))
        gain = {w: math.log(1 + (total - self.holding[w] + 0.5) / (self.holding[w] + 0.5)) for w in asked if w in count}
        return sum(idf * count[w] * (k + 1) / (count[w] + norm) for w, idf in gain.items())

    def open(self, name: str) -> str:
        """The first lines of a document."""
        text = self.documents.get(name)
        return f"no file {name}" if text is None else "\n".join(text.splitlines()[:WINDOW])

    def search(self, query: str) -> str:
        """Lines that hold a word of `query`, each behind its document's name."""
        wanted = _words(query)
        lines = [f"{n}: {line}" for n, text in self.documents.items() for line in text.splitlines()]
        return "\n".join([x for x in lines if wanted & _words(x)][:WINDOW]) or f"nothing found for {query}"


def _words(text: str) -> Counter[str]:
    return Counter(w.lower() for w in WORD.findall(text))


class TextReflexion(Agent):
    """Reflexion on a row of a question-answering set: an exact match ends it, after a miss the model can reflect.

    Slots: those of `Reflexion`, without notes. Feedback never contains the answer. `answered` holds the answers given;
    `score` is 1 once one of them is an exact match.
    """

    name, template = Reflexion.name, Reflexion.template

    def __init__(self, example: TaskExample, trials: int = TRIALS) -> None:
        super().__init__(example.id)
        self.question, self.trials = example.questions[0], trials
        self.solved_by = compared_as(self.question.answers)
        fixed = [s for s in example.segments if s.role == "reuse"]
        if len(fixed) < 2:
            raise DataError(
                f"{example.id}: Reflexion needs a system prompt and documents, not {len(fixed)} fixed segments"
            )
        self.documents = [f"\n{s.text.strip()}" for s in fixed[1:]]
        self.reflections: list[str] = []
        self.history: list[str] = []
        self.answered: list[str] = []
        self.feedback = self._pending_feedback = ""

    def make_tools(self) -> list[Tool]:
        return [
            Tool("answer", ("text",), self._answer, rest=True, about="the shortest answer"),
            Tool("reflect", ("text",), self._reflect, rest=True, about="what went wrong , after a wrong answer"),
        ]

    def slots(self):
        return {
            "system": "\nAnswer the question from the documents below. One call a turn:"
            + describe(list(self.tools.values())),
            "notes": "",
            "reflections": "".join(f"\nReflection: {r}" for r in self.reflections),
            "documents": self.documents,
            "history": self.history,
            "question": f"\n{self.question.text.strip()}",
            "feedback": self.feedback,
            "cue": "\nCall:",
        }

    def observe(self, call: Call, result: str, failed: bool) -> None:
        self.feedback, self._pending_feedback = self._pending_feedback, ""

    def score(self) -> float:
        return max((score(a, self.question.answers)["em"] for a in self.answered), default=0.0)

    def _answer(self, text: str) -> str:
        self.answered.append(text)
        self.finished = bool(self.score()) or len(self.answered) == self.trials
        self._pending_feedback = "" if self.finished else f"\nFeedback: {text} is wrong."
        self.history.append(f"\nTrial {len(self.answered)}: {text}")
        return "right" if self.score() else "wrong"

    def _reflect(self, text: str) -> str:
        self.reflections.append(text)
        return "noted"


class DocumentReader(Agent):
    """Retrieves a document a turn, runs the command the model writes, and answers on the last turn.

    Slots: system, observation (updated: what the last command printed), record (fixed, growing: documents and what was
    asked and written, in order), question (updated). The record holds the model's own text exactly as it was
    generated, so that its KV can be retained. Tools read the example's own documents; no code is run.

    Parameters
    ----------
    example : TaskExample
        Its first fixed segment is the system prompt, the others are documents; one called "issue" is shown at once.
    turns : int
    """

    name = "swe_style"
    template = Template(
        (
            Slot("system", "reuse"),
            Slot("observation", "recompute"),
            Slot("record", "reuse", grows=True),
            Slot("cue", "recompute"),
        )
    )

    def __init__(self, example: TaskExample, turns: int) -> None:
        super().__init__(example.id)
        self.question, self.turns = example.questions[0], turns
        self.solved_by = compared_as(self.question.answers)
        self.head, *rest = [s for s in example.segments if s.role == "reuse"]
        issue, documents = (rest[0], rest[1:]) if rest and rest[0].name == "issue" else (None, rest)
        self.library = Library({s.name or f"document {i}": s.text for i, s in enumerate(documents)})
        self.record = [] if issue is None else [issue.text]
        self.query = issue.text if issue is not None else self.question.text
        self.observation = "\n".join(s.text for s in example.segments if s.role == "recompute")
        self.retrieved: list[list[str]] = []
        self.written = ""
        self._retrieve()

    def make_tools(self) -> list[Tool]:
        return [
            Tool("open", ("name",), lambda name: self.library.open(name), rest=True),
            Tool("search", ("words",), lambda words: self.library.search(words), rest=True),
            Tool("none", (), lambda: "no command understood"),
            Tool("answer", ("text",), lambda text: "answered", rest=True),
        ]

    def slots(self):
        return {
            "system": self.head.text,
            "observation": f"{self.observation}\n",
            "record": self.record,
            "cue": self.cue,
        }

    @property
    def cue(self) -> str:
        """This turn's cue: it requests a command, or on the last turn contains the question."""
        return self.question.text if len(self.retrieved) == self.turns else ASK

    def parse(self, output: str) -> Call:
        """The first command in the output; on the last turn all of it is the answer."""
        self.written = output
        if len(self.retrieved) == self.turns:
            return Call("answer", (output,))
        try:
            found = COMMAND.search(output)
            return Call("none", ()) if found is None else super().parse(found[0])
        except MalformedCall:  # control characters
            return Call("none", ())

    def observe(self, call: Call, result: str, failed: bool) -> None:
        self.at += 1  # the same command on a later turn is no repetition
        if call.tool == "answer":
            self.finished = True
            return
        self.record.append(self.cue + self.written)
        self.observation, self.query = result, self.written or self.query
        self._retrieve()

    def score(self) -> float:
        return score(self.written, self.question.answers)["em"] if self.finished else 0.0

    def _retrieve(self) -> None:
        names = self.library.rank(self.query, without=[n for turn in self.retrieved for n in turn])[:1]
        self.record += [f"\n{self.library.documents[n]}\n" for n in names]
        self.retrieved.append(names)
