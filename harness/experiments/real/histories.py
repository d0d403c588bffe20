"""Histories that grow for twelve turns: the KV of each turn is kept with its errors.

Every turn has new notes and one more passage. A passage is computed in the turn in which it appears, over the KV that
the system reused before it, and copied out of that turn (`ReuseEngine.retain`), so that errors may accumulate.
Systems of isolated chunks encode each passage alone, once.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cacheslide.core.engine import ReuseEngine
from cacheslide.core.prompt import Prompt
from cacheslide.store import MemoryChunkStore
from harness.backends.reference import ReferenceBackend
from harness.experiments.real.arms import Arm
from harness.experiments.real.measure import Reference, engine_of, measure_turns
from harness.experiments.real.trials import ANSWER, NOTES, Builder
from harness.tasks.passages import PassageRow, answer_passages

TURNS = 12
PASSAGE = 500  # maximum tokens that a turn adds
ENDLESS = 10**6  # generations: nothing is re-encoded


@dataclass(frozen=True)
class History:
    """The prompts of a session, and the answer that the last turn's question asks for."""

    id: str
    dataset: str
    prompts: tuple[Prompt, ...]
    answer: tuple[int, ...]
    about: dict[str, Any] = field(default_factory=dict)


def history(builder: Builder, row: PassageRow) -> History | None:
    """The session of one row, the needed passages first; None if no passage holds the answer."""
    rng = random.Random(f"{builder.seed} histories {row.sha256}")
    needed = list(row.gold) or list(answer_passages(row))
    if not needed:
        return None
    own = [row.passages[i] for i in needed] + [p for i, p in enumerate(row.passages) if i not in needed]
    texts = [builder.passage(t)[:PASSAGE] for t in own[:TURNS]]
    while len(texts) < TURNS:
        texts.append(builder.filler(row, PASSAGE, rng))
    question = builder.encode(f"Question: {row.question}\nAnswer:")
    prompts = [
        builder.prompt(builder.filler(row, rng.randint(*NOTES), rng), texts[: turn + 1], question)
        for turn in range(TURNS)
    ]
    about = {"row": row.id, "row_sha256": row.sha256, "turns": TURNS}
    answer = builder.encode(" " + row.answers[0])[:ANSWER]
    return History(f"histories {row.dataset} {row.id}", row.dataset, tuple(prompts), answer, about)


def measure_history(
    backend: ReferenceBackend, session: History, arms: Sequence[Arm], done: set[str], every: int = 1
) -> Iterator[dict[str, Any]]:
    """One record an arm and turn from the second turn on, every `every`-th of them and the last."""
    last = len(session.prompts) - 1
    turns = [t for t in range(1, last + 1) if t == last or t % every == 0]

    def start(one: Arm) -> "Turns | None":
        return None if one.policy is None else Turns(backend, one)

    def reference(turn: int) -> "Reference":
        return Reference(backend, session.prompts[turn], session.answer)

    def serve(run: "Turns | None", turn: int, exact: "Reference | None") -> dict[str, Any]:
        if run is not None:
            return run.serve(session.prompts[turn], exact)
        return {} if exact is None else exact.noise()

    yield from measure_turns(session, arms, turns, done, start, reference, serve)


class Turns:
    """One system's caches over the turns of one session."""

    def __init__(self, backend: ReferenceBackend, one: Arm) -> None:
        self.engine: ReuseEngine = engine_of(backend, one.policy, MemoryChunkStore(), MemoryChunkStore())

    def serve(self, prompt: Prompt, reference: Reference | None) -> dict[str, Any]:
        """Serve a turn, compare it with `reference` if given, and retain its KV."""
        state = self.engine.prefill(prompt, room=0 if reference is None else reference.room)
        out = {} if reference is None else reference.figures(state)
        self.engine.retain(state, prompt, ENDLESS)
        return out
