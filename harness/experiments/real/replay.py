"""Recorded sessions replayed: every turn reuses KV of earlier prompts on the spans of `cacheslide.analysis`.

The spans are those counted in figure 3: the prefix shared with the previous prompt, and earlier text in the same order.
The prefix is served as by a prefix cache; the ratio applies to the spans behind it, since a rule that recomputes the
first tokens would otherwise spend its budget on unmoved text. A chain arm takes the spans' KV from the earlier turn,
errors included; an isolated arm encodes each span alone. The targets are recompute's own next 32 tokens. A prompt
beyond the length limit ends a session's replay.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from cacheslide.analysis.counting import ModelCounter
from cacheslide.analysis.kinds import TurnKinds, session_kinds
from cacheslide.analysis.session import Session
from cacheslide.core.encoder import prefill_exact, read_chunk, write_known
from cacheslide.core.engine import Prefilled
from cacheslide.core.placement import Piece
from cacheslide.core.prompt import Prompt
from cacheslide.core.receipt import Receipt
from cacheslide.core.request_builder import Found
from cacheslide.store import MemoryChunkStore
from cacheslide.store.base import ChunkKV
from harness.backends.reference import ReferenceBackend
from harness.experiments.real.arms import Arm
from harness.experiments.real.measure import Reference, engine_of, measure_turns
from harness.experiments.real.sessions import find_sessions, group_of

SHORTEST = 64  # minimum prompt tokens of a measured turn


@dataclass(frozen=True)
class Recorded:
    """A session's prompts as token ids, and their tokens by kind. `about` holds ids, hashes and numbers."""

    id: str
    dataset: str
    prompts: tuple[tuple[int, ...], ...]
    kinds: tuple[TurnKinds, ...]
    about: dict[str, Any] = field(default_factory=dict)


def recorded(folder: Path, model: str | Path, longest: int, most: int, turns: int) -> list[Recorded]:
    """At most `most` sessions of each group, each of at least three prompts of at most `longest` tokens.

    `turns` bounds the turns of a session; later ones, and those after a longer prompt, are left out.
    """
    sessions = [session for _, members in find_sessions(folder) for session in members]
    counter = ModelCounter(model, [turn for session in sessions for turn in session.turns])
    out: list[Recorded] = []
    for session in sessions:
        group = group_of(session)
        if sum(r.dataset == group for r in out) < most:
            prompts = _usable([tuple(counter.ids(turn).tolist()) for turn in session.turns[:turns]], longest)
            if len(prompts) > 2:
                out.append(_recorded(session, group, prompts))
    return out


def _usable(prompts: Sequence[tuple[int, ...]], longest: int) -> list[tuple[int, ...]]:
    fitting = takewhile(lambda prompt: len(prompt) <= longest, prompts)
    return [prompt for prompt in fitting if len(prompt) >= SHORTEST]


def _recorded(session: Session, group: str, prompts: list[tuple[int, ...]]) -> Recorded:
    about = {"session": session.id, "sha256": session.sha256, "of_turns": len(session.turns), "turns": len(prompts)}
    identity = f"replay {group} {session.id}"
    return Recorded(identity, group, tuple(prompts), tuple(session_kinds(prompts)), about)


def measure_session(
    backend: ReferenceBackend, session: Recorded, arms: Sequence[Arm], done: set[str]
) -> Iterator[dict[str, Any]]:
    """One record per arm and turn from the second on."""

    def start(one: Arm) -> "Replayed | None":
        return None if one.policy is None else Replayed(backend, one)

    def reference(turn: int) -> "Reference":
        return Reference(backend, Prompt.from_spans(session.prompts[turn], []), ())

    def serve(run: "Replayed | None", turn: int, exact: "Reference | None") -> dict[str, Any]:
        state = None if run is None else run.serve(session.prompts[turn], session.kinds[turn])
        if exact is None:
            return {}
        return exact.noise() if state is None else exact.figures(state)

    yield from measure_turns(session, arms, range(1, len(session.prompts)), done, start, reference, serve)


class Replayed:
    """One system over the turns of one session, with the KV of every turn."""

    def __init__(self, backend: ReferenceBackend, one: Arm) -> None:
        self.policy, self.model, self.family = one.policy, backend.model, one.family
        self.engine = engine_of(backend, one.policy, MemoryChunkStore())
        self.left: list[ChunkKV] = []
        self._alone: dict[tuple[int, ...], ChunkKV] = {}

    def serve(self, ids: tuple[int, ...], kinds: TurnKinds, room: int = 64) -> Prefilled:
        """Prefill a turn over the KV of earlier turns, and keep its KV."""
        engine, n, policy = self.engine, len(ids), self.policy
        kv, prefix = self.model.new_kv(n + room), self._prefix(ids, kinds)
        start = write_known(self.model, kv, prefix)
        request = engine.builder.build(
            ids[start:],
            range(start, n),
            kv,
            found=self._found(ids, kinds, start),
            placement=policy.placement,
            correction=policy.correction,
            start=start,
        )
        [output] = engine.executor.run([request])
        receipt = Receipt(policy.name, n).complete(output, len(request.reused))
        receipt.tokens_reused += start
        self.left.append(read_chunk(self.model, request.kv, range(n), 0, n))
        logits = self.model.logits(output.hidden[None])[0]
        return Prefilled(request.kv, n, n, logits, receipt, output, plan=None)

    def _prefix(self, ids: tuple[int, ...], kinds: TurnKinds) -> list[Piece]:
        """The rows at the same positions as in the previous prompt, without this prompt's last token."""
        length = min(kinds.prefix, len(ids) - 1)
        return [self._piece(ids[:length], len(self.left) - 1, 0)] if length else []

    def _found(self, ids: tuple[int, ...], kinds: TurnKinds, start: int) -> Found:
        """The spans in order, as rows from `start` on, without the last token, which is always computed."""
        found = Found()
        for span in kinds.spans:
            length = min(span.length, len(ids) - 1 - span.start)
            if span.in_order and length > 0:
                text = ids[span.start : span.start + length]
                found.pieces.append(self._piece(text, span.source, span.place))
                found.spans.append(range(span.start - start, span.start - start + length))
        return found

    def _piece(self, ids: tuple[int, ...], source: int, place: int) -> Piece:
        """The rows of `ids` from turn `source` at `place`; for an isolated arm, the span encoded alone."""
        if self.family == "iso":
            return Piece(self._encoded(ids), len(ids))
        return Piece(self.left[source], len(ids), place)

    def _encoded(self, ids: tuple[int, ...]) -> ChunkKV:
        if ids not in self._alone:
            kv = prefill_exact(self.model, ids)
            self._alone[ids] = read_chunk(self.model, kv, range(len(ids)), 0, len(ids))
        return self._alone[ids]
