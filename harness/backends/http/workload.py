"""Synthetic conversations: fixed chunks, with updated text between them that changes and moves them every turn."""

import random
from dataclasses import dataclass

from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.errors import DataError


@dataclass(frozen=True)
class Shape:
    """Prompts of exactly `tokens` ids below `vocab`; `reused` is the share of them that is fixed, in `chunks` chunks.

    The prompt starts and ends with updated ids; with `system`, so many of the fixed ids stand in front of it all. Ids
    in the lowest eighth of the vocabulary, the usual place of special tokens, are not used. Random ids measure speed,
    not quality.
    """

    tokens: int
    vocab: int
    reused: float = 0.9
    chunks: int = 8
    system: int = 0

    def __post_init__(self) -> None:
        if self.updated < 2 * (self.chunks + 1):
            raise DataError(
                f"a prompt of {self.tokens} tokens leaves {self.updated} updated ones, which is too few to move "
                f"{self.chunks} chunks: at least {2 * (self.chunks + 1)} are needed"
            )
        if self.tokens - self.updated - self.system < self.chunks:
            fixed = self.tokens - self.updated - self.system
            raise DataError(f"{fixed} fixed tokens cannot make {self.chunks} chunks")

    @property
    def updated(self) -> int:
        """Updated tokens per prompt."""
        return self.tokens - round(self.reused * self.tokens)


class Conversation:
    """One client's prompts by turn; the same for every measured system.

    Every turn has new updated ids, and its first chunk starts at another row than in the turn before.
    """

    def __init__(self, shape: Shape, seed: int, number: int) -> None:
        self.shape, self.name = shape, f"{seed}-{number}-{shape.tokens}"
        rng = random.Random(f"fixed-{self.name}")
        fixed = shape.tokens - shape.updated - shape.system
        sizes = [fixed * (i + 1) // shape.chunks - fixed * i // shape.chunks for i in range(shape.chunks)]
        self.fixed = [self._ids(rng, n) for n in sizes]
        self.system = self._ids(rng, shape.system)

    def _ids(self, rng: random.Random, count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(self.shape.vocab // 8, self.shape.vocab) for _ in range(count))

    def _gaps(self, turn: int) -> list[int]:
        """Lengths of the updated segments, in order; at least one token each."""
        rng, parts = random.Random(f"gaps-{self.name}-{turn}"), self.shape.chunks + 1
        before = self._gaps(turn - 1)[0] if turn else 0
        while True:
            cuts = sorted(rng.sample(range(1, self.shape.updated), parts - 1))
            gaps = [b - a for a, b in zip([0, *cuts], [*cuts, self.shape.updated], strict=True)]
            if gaps[0] != before:
                return gaps

    def turn(self, number: int) -> Prompt:
        """The prompt of turn `number`, from 0."""
        rng, segments = random.Random(f"updated-{self.name}-{number}"), []
        gaps = self._gaps(number)
        if self.system:
            segments.append(Segment(self.system, Role.REUSE))
        for gap, ids in zip(gaps, [*self.fixed, ()], strict=True):
            segments.append(Segment(self._ids(rng, gap), Role.RECOMPUTE))
            if ids:
                segments.append(Segment(ids, Role.REUSE))
        return Prompt(tuple(segments))
