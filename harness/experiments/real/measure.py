"""One trial under every arm: logits of the targets compared with recompute's, over caches of the previous turn."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from cacheslide.core.engine import Prefilled, ReuseEngine
from cacheslide.core.prompt import Prompt
from cacheslide.errors import CacheSlideError
from cacheslide.quality.divergence import divergence
from cacheslide.store import MemoryChunkStore
from harness.backends.reference import EngineSettings, ReferenceBackend
from harness.experiments.real.arms import Arm
from harness.experiments.real.trials import Trial
from harness.systems import resolve

GREEDY = 32  # tokens of recompute's own continuation
PIECE = 512  # tokens per step of the noise floor's prefill


class Reference:
    """Full recompute of one prompt: its logits over the answer, if it has one, and over its own greedy continuation."""

    def __init__(self, backend: ReferenceBackend, prompt: Prompt, answer: Sequence[int]) -> None:
        self.prompt, self.answer = prompt, tuple(answer)
        self.room = max(len(answer), GREEDY)
        self.engine = exact_engine(backend)
        state = self.engine.prefill(prompt, room=self.room)
        where = state.length, state.next_position
        self.on_answer = self.engine.score(state, self.answer) if self.answer else None
        self.greedy = tuple(self.engine.generate(state, state.logits, GREEDY, frozenset()))
        state.length, state.next_position = where
        self.on_greedy = self.engine.score(state, self.greedy)

    def compare(self, engine: ReuseEngine, state: Prefilled) -> dict[str, Any]:
        """Divergence of another prefill of the prompt: over the answer, and over recompute's continuation."""
        pairs = {"greedy": (self.on_greedy, self.greedy)}
        if self.answer:
            pairs["answer"] = self.on_answer, self.answer
        return {n: asdict(divergence(exact, engine.score(state, ids), ids)) for n, (exact, ids) in pairs.items()}

    def figures(self, state: Prefilled) -> dict[str, Any]:
        """A record's figures for another prefill of the prompt: its receipt and its divergence."""
        # Scoring computes exactly over the existing KV, equally under every policy.
        return receipt_of(state, len(self.prompt)) | self.compare(self.engine, state)

    def noise(self) -> dict[str, Any]:
        """Figures of recompute with another batching."""
        return receipt_of(None, len(self.prompt)) | self.compare(self.engine, self.in_pieces())

    def in_pieces(self) -> Prefilled:
        """The same prefill in pieces of `PIECE` tokens, to measure the effect of batching on exact recompute."""
        ids = self.prompt.token_ids
        first = Prompt.from_spans(ids[:PIECE], [])
        state = self.engine.prefill(first, room=len(ids) - len(first) + self.room)
        for at in range(PIECE, len(ids), PIECE):
            state.logits = self.engine.extend(state, ids[at : at + PIECE])
        return state


def exact_engine(backend: ReferenceBackend) -> ReuseEngine:
    """An engine that reuses nothing."""
    return engine_of(backend, resolve(["recompute"])[0], MemoryChunkStore())


def engine_of(backend: ReferenceBackend, policy, store, corrected=None) -> ReuseEngine:
    """An engine that stores chunks in the model's dtype, one per passage."""
    name = str(backend.model.dtype).removeprefix("torch.")
    settings = EngineSettings(chunk_size=8192, store_dtype=name)
    return backend.engine(policy, store, settings, corrected=corrected)


def measure(backend: ReferenceBackend, trial: Trial, arms: Iterable[Arm], done: set[str]) -> Iterator[dict[str, Any]]:
    """One record per arm that is not in `done`; an arm that cannot run gives a record with the reason."""
    todo = [a for a in arms if record_id(trial, a) not in done]
    if not todo:
        return
    reference = Reference(backend, trial.prompt, trial.answer)
    plain, scored = MemoryChunkStore(), MemoryChunkStore()  # chunks that need no scores are encoded without
    for one in todo:
        about = {"id": record_id(trial, one), "trial": trial.id, "arm": one.name}
        store = scored if one.policy is not None and one.policy.needs_scores else plain
        try:
            yield about | run_arm(backend, reference, trial, one, store)
        except CacheSlideError as refused:
            yield about | {"failure": str(refused)}


def run_arm(
    backend: ReferenceBackend, reference: Reference, trial: Trial, one: Arm, store: MemoryChunkStore
) -> dict[str, Any]:
    """Divergence and receipt of one arm; `store` is shared by the arms of a trial; its keys distinguish encodings."""
    if one.policy is None:
        return reference.noise()
    engine = engine_of(backend, one.policy, store)
    engine.build(trial.previous)
    return reference.figures(engine.prefill(trial.prompt, room=reference.room))


def receipt_of(state: Prefilled | None, tokens: int) -> dict[str, Any]:
    """The fields of a receipt that a record keeps."""
    if state is None:
        return {"tokens": tokens, "tokens_reused": 0, "tokens_recomputed": 0, "compute_fraction": 1.0}
    r = state.receipt
    return {
        "tokens": tokens,
        "tokens_reused": r.tokens_reused,
        "tokens_recomputed": r.tokens_recomputed,
        "compute_fraction": r.compute_fraction,
    }


class Attempts:
    """Arms over the turns of one session: after a failure an arm has no caches, so its later turns fail too."""

    def __init__(self) -> None:
        self._why: dict[str, str] = {}

    def figures(self, one: Arm, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `work` for a turn of `one`, or the reason for its failure."""
        if one.name in self._why:
            return {"failure": f"an earlier turn failed: {self._why[one.name]}"}
        try:
            return work()
        except CacheSlideError as refused:
            self._why[one.name] = str(refused)
            return {"failure": str(refused)}


def measure_turns(
    session: Any,
    arms: Sequence[Arm],
    turns: Sequence[int],
    done: set[str],
    start: Callable[[Arm], Any],
    reference: Callable[[int], Reference],
    serve: Callable[[Any, int, Reference | None], dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """One record per arm and turn of `turns` that is not in `done`.

    An arm reruns from its first turn unless all its turns are done, since its caches come from its earlier turns.

    Parameters
    ----------
    session : object
        With an `id` and `prompts`.
    start : callable
        An arm's caches, before its first turn.
    reference : callable
        Full recompute of a turn's prompt.
    serve : callable
        Serves a turn with an arm's caches; its figures, empty without a reference.
    """
    missing = {(a.name, t) for a in arms for t in turns if turn_id(session, a, t) not in done}
    todo = [a for a in arms if any((a.name, t) in missing for t in turns)]
    runs, attempts = {a.name: start(a) for a in todo}, Attempts()
    for turn in range(len(session.prompts) if todo else 0):
        exact = reference(turn) if any((a.name, turn) in missing for a in todo) else None
        for one in todo:
            about = {"id": turn_id(session, one, turn), "trial": session.id, "arm": one.name, "turn": turn}
            figures = attempts.figures(one, partial(serve, runs[one.name], turn, exact))
            if (one.name, turn) in missing:
                yield about | figures


def turn_id(session: Any, one: Arm, turn: int) -> str:
    """One arm at one turn of a session."""
    return f"{session.id} | {one.name} | turn {turn}"


def record_id(trial: Trial, one: Arm) -> str:
    """One arm on one trial."""
    return f"{trial.id} | {one.name}"
