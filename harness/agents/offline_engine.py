"""vLLM in this process as a completer: fixed spans are annotated, a session's generated text is retained as history."""

import re
from collections.abc import Sequence

from cacheslide.core.prompt import Prompt
from cacheslide.vllm.turns import Turns
from harness.agents.completer import Completion, Request
from harness.backends.scripted import Engine
from harness.tasks.example import TextSegment

SHAPE = re.compile("F(U*)(F*)(U+)")  # fixed and updated segments


class _Session:
    """The token ids of one episode: repeated and generated text keeps its ids in later turns."""

    def __init__(self, engine: Engine, head: str) -> None:
        self.engine, self.head = engine, head
        self.talk = Turns([*engine.begin(), *engine.encode(head)])
        self.known: list[str] = []
        self.generated = ""  # the last question and answer, with the ids they were served in: they can become history

    def turn(self, updated: str, fixed: list[str], question: str) -> tuple[list[int], dict] | None:
        """This turn's ids and annotations; None when earlier fixed text changed."""
        if fixed[: len(self.known)] != self.known:
            return None
        new = fixed[len(self.known) :]
        if self.generated and new[:1] == [self.generated]:
            new = new[1:]  # `Turns` holds it already
        elif self.generated:
            return None  # the generated text did not become history
        for text in new:
            self.talk.add(self.engine.encode(text))
        self.known, self.generated = list(fixed), ""
        return self.talk.prompt(self.engine.encode(updated), self.engine.encode(question))


class OfflineEngine:
    """Serves agents on `harness.backends.scripted.Engine`, one request at a time.

    Prompts of the shape head, updated text, fixed text, question, whose history repeats questions and outputs word for
    word, have their generated KV retained (`Turns`). Any other template has only its fixed segments annotated.
    """

    def __init__(self, engine: Engine, system: str, stop_ids: Sequence[int] = ()) -> None:
        self.engine, self.system, self.stop_ids = engine, system, tuple(stop_ids)
        self.sessions: dict[str, _Session] = {}

    def complete(self, request: Request) -> Completion:
        """Greedy, up to the end of sequence or one of `stop_ids`; stop texts are not applied.

        `prompt_ids` is one run of all ids.
        """
        shape = split(request.segments)
        served = None
        if shape is not None:
            head, updated, fixed, question = shape
            session = self.sessions.get(request.session)
            if session is None and not request.step:
                session = self.sessions[request.session] = _Session(self.engine, head)
            served = session and session.head == head and session.turn(updated, fixed, question)
        if not served:
            self.sessions.pop(request.session, None)
        ids, annotations = served or self._annotated(request.segments)
        got = self.engine.ask(ids, annotations, request.max_tokens, self.stop_ids)
        if served:
            session.talk.answered(got.generated)
            session.generated = question + got.text if got.generated else ""
        return Completion.of(got, Prompt.from_spans(ids, ()))

    def _annotated(self, segments: tuple[TextSegment, ...]) -> tuple[list[int], dict]:
        ids, spans = list(self.engine.begin()), []
        for number, segment in enumerate(segments):
            start = len(ids) if number else 0
            ids += self.engine.encode(segment.text)
            if segment.role == "reuse" and len(ids) > start:
                spans.append([start, len(ids)])
        return ids, {"segments": spans}


def split(segments: tuple[TextSegment, ...]) -> tuple[str, str, list[str], str] | None:
    """(head, updated, fixed texts, question) of a prompt of that shape; None for any other."""
    found = SHAPE.fullmatch("".join("F" if s.role == "reuse" else "U" for s in segments))
    if found is None:
        return None
    texts = [s.text for s in segments]
    updated, fixed, question = (texts[found.start(i) : found.end(i)] for i in (1, 2, 3))
    return texts[0], "".join(updated), fixed, "".join(question)
