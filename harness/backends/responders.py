"""The interface of backends for experiments: fill caches from the turn before, answer, time a first token, run a load.

A responder has one set of caches. `ReferenceResponder` runs the engine over the plain-PyTorch model;
`harness.backends.vllm` has the one over vLLM. A backend's `sessions` opens responders for its systems.
"""

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from cacheslide.core.encoder import prefill_exact
from cacheslide.core.engine import Prefilled
from cacheslide.core.prompt import Prompt, Role
from cacheslide.policies.base import ReusePolicy, unchanged
from cacheslide.quality.similarity import cksim
from cacheslide.store import DirectoryChunkStore, MemoryChunkStore
from harness.backends.client import Request, Result
from harness.backends.reference import EngineSettings, ReferenceBackend
from harness.backends.reference_client import ReferenceClient
from harness.backends.tokens import Tokens
from harness.experiments.study.chunks import build_chunks
from harness.scoring import question_record
from harness.systems import System
from harness.tasks.example import TaskExample


@dataclass
class Response:
    """Answers to the questions of one example, with receipts and times.

    `receipts` has one per request: a single one if the context is prefilled once for all questions. `cksim` is per
    layer over the fixed rows, None if not measured. `seconds` is the time of the prefill or to the first token; None if
    requests of one batch share it.
    """

    seconds: float | None
    receipts: list[dict[str, Any]]
    texts: list[str] = field(default_factory=list)
    cksim: list[float] | None = None


class Responder(Protocol):
    """See the module. `backend` tokenises texts."""

    backend: Tokens

    def fill(self, examples: Sequence[TaskExample], systems: Sequence[System]) -> dict[str, Any]:
        """Drop all caches and fill them from the previous turns of `examples`; returns the cost by cache."""

    def respond(self, system: System, example: TaskExample, max_new_tokens: int) -> Response:
        """Answer every question of `example`."""

    def first_token(self, system: System, example: TaskExample, max_new_tokens: int, answer: bool) -> Response:
        """Time the first token of the first question; with `answer`, also answer all questions."""

    def closed_loop(
        self, system: System, examples: Sequence[TaskExample], clients: int, max_new_tokens: int
    ) -> tuple[list[dict[str, Any]], float]:
        """One question per example from `clients` clients: records by time of finish, and the total seconds."""


def reference_sessions(
    backend: ReferenceBackend,
    systems: Sequence[System],
    settings: EngineSettings,
    chunks: str | None = None,
    similarity: bool = False,
) -> Iterator[tuple["ReferenceResponder", Sequence[System]]]:
    """A single responder for all systems."""
    yield ReferenceResponder(backend, settings, chunks, similarity), systems


class ReferenceResponder:
    """The engine over the reference model. With `chunks`, a folder of chunk caches, nothing is filled or dropped."""

    def __init__(
        self, backend: ReferenceBackend, settings: EngineSettings, chunks: str | None = None, similarity: bool = False
    ) -> None:
        self.backend, self.settings, self.similarity = backend, settings, similarity
        self.prebuilt = chunks is not None
        self.store = MemoryChunkStore() if chunks is None else DirectoryChunkStore(chunks)
        self._exact: tuple[str, torch.Tensor] | None = None

    def fill(self, examples: Sequence[TaskExample], systems: Sequence[System]) -> dict[str, Any]:
        """See `Responder.fill`."""
        if self.prebuilt:
            return {}
        self.store = MemoryChunkStore()
        return build_chunks(self.backend, examples, systems, self.store, self.settings, progress=None)

    def respond(self, system: ReusePolicy, example: TaskExample, max_new_tokens: int) -> Response:
        """See `Responder.respond`. The context is prefilled once and each question follows it: equal to prefilling both
        together (tested), at a fraction of the cost. A system whose rule uses the question gets one prefill a question,
        whose time includes the answer, so none is reported."""
        backend, engine = self.backend, self._engine(system)
        prompt = backend.prompt(example.segments)
        if system.asks:
            texts, states = backend.answers_each(engine, example, max_new_tokens)
            similar = self._similar(system, example, prompt, states[0])
            return Response(None, [s.receipt.as_dict() for s in states], texts, similar)
        shortest = min(map(len, backend.questions(example)))
        started = time.perf_counter()
        state = engine.prefill(prompt, following=shortest, room=backend.room(example, max_new_tokens))
        seconds = time.perf_counter() - started
        similar = self._similar(system, example, prompt, state)
        texts = backend.answers(state, example, max_new_tokens)
        return Response(seconds, [state.receipt.as_dict()], texts, similar)

    def _similar(
        self, system: ReusePolicy, example: TaskExample, prompt: Prompt, state: Prefilled
    ) -> list[float] | None:
        """CKSim of a prefilled prompt, where it is asked for and its rows lie where recompute's do."""
        if self.similarity and system.transform is unchanged and not system.placement.slot:
            return self._compare(example, prompt, state.kv.k)  # row i is row i of recompute, at the same position
        return None

    def _compare(self, example: TaskExample, prompt: Prompt, got: torch.Tensor) -> list[float]:
        """CKSim per layer over the fixed rows, after reuse and correction, relative to an exact prefill."""
        if self._exact is None or self._exact[0] != example.id:
            self._exact = example.id, prefill_exact(self.backend.model, prompt.token_ids).k
        spans = zip(prompt.segments, prompt.starts, strict=True)
        rows = [torch.arange(at, at + len(s.token_ids)) for s, at in spans if s.role is Role.REUSE]
        fixed = torch.cat(rows)
        return cksim(self._exact[1][:, fixed], got[:, fixed]).mean(dim=1).tolist()

    def first_token(self, system: ReusePolicy, example: TaskExample, max_new_tokens: int, answer: bool) -> Response:
        """See `Responder.first_token`. Lookup, load, placement, prefill and logits are timed; answers come from the
        timed state after its question's rows are dropped. A system whose rule uses the question answers each question
        with a prefill of its own."""
        backend, engine = self.backend, self._engine(system)
        prompt = backend.prompt(example.segments, example.questions[0].text)
        room = backend.room(example, max_new_tokens)
        gc.collect()
        started = time.perf_counter()
        state = engine.prefill(prompt, room=room)
        int(state.logits.argmax())
        seconds = time.perf_counter() - started
        response = Response(seconds, [state.receipt.as_dict()])
        if answer and system.asks:
            response.texts, _ = backend.answers_each(engine, example, max_new_tokens)
        elif answer:
            plan = engine.plan(backend.prompt(example.segments))
            state.length, state.next_position = len(plan.prompt), plan.positions[-1] + 1
            response.texts = backend.answers(state, example, max_new_tokens)
        return response

    def closed_loop(
        self, system: ReusePolicy, examples: Sequence[TaskExample], clients: int, max_new_tokens: int
    ) -> tuple[list[dict[str, Any]], float]:
        """See `Responder.closed_loop`. Served in rounds: all clients' requests are prefilled in one packed run and
        decoded in packed steps; then every client sends its next request."""
        backend, stop = self.backend, self.backend.stop_ids()
        client = ReferenceClient(backend, system, self.store, self.settings, generations=None)
        prompts = [backend.prompt(e.segments, e.questions[0].text) for e in examples]
        client.engine.prefill_batch(prompts[:1])  # warm-up, not counted
        requests = [
            Request(e.id, prompt, max_new_tokens, stop_ids=stop) for e, prompt in zip(examples, prompts, strict=True)
        ]
        started = time.perf_counter()
        results = client.run(requests, clients)
        seconds = time.perf_counter() - started
        return load_records(backend, examples, results, started), seconds

    def _engine(self, system: ReusePolicy):
        return self.backend.engine(system, self.store, self.settings)


def load_records(
    tokens: Tokens, examples: Sequence[TaskExample], results: Sequence[Result], started: float
) -> list[dict[str, Any]]:
    """One record per request of a load, by time of finish; PromptError for a request with a failure.

    In seconds: `ttft_seconds` since its sending, `finished_seconds` since the start of the load.
    """
    records = [
        {
            "example": example.id,
            "ttft_seconds": result.checked().ttft,
            "finished_seconds": result.finished - started,
            "decode_tokens": len(result.token_ids),
            "tokens_reused": result.receipt["tokens_reused"],
            "receipt": result.receipt,
            "question": question_record(example, example.questions[0], tokens.decode(result.token_ids)),
        }
        for example, result in zip(examples, results, strict=True)
    ]
    return sorted(records, key=lambda r: r["finished_seconds"])
