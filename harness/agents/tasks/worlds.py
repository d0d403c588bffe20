"""Tasks over a world of names and values (`harness.tasks.synthetic`), some of which change as the task goes on."""

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import TypeVar

from cacheslide.errors import DataError
from harness.tasks.synthetic.prompts import chunks_for
from harness.tasks.synthetic.words import values
from harness.tasks.synthetic.world import MIXES, World, build_world, pick

DEPTH = 9
_STATEMENTS = 9
Task = TypeVar("Task")


def draw_tasks(
    kind: str,
    draw: Callable[[Random, str, str, World, int], Task],
    split: str,
    seed: int,
    count: int,
    size: int,
    tokens: int,
    mix: str,
    depth: int,
) -> Iterator[Task]:
    """`count` tasks of `size` questions or turns over `make_world`s; the same arguments always give the same ones.

    `draw` takes a random generator, the task's name, the split, the world and `size`.
    """
    for i in range(count):
        rng = Random(f"agents-{kind}-{mix}-{split}-{seed}-{tokens}-{size}-{i}")
        yield draw(rng, f"{kind}-{split}-{seed}-{i:05d}", split, make_world(rng, mix, split, tokens, depth), size)


def make_world(rng: Random, mix: str, split: str, tokens: int, depth: int = DEPTH) -> World:
    """A world whose documents have about `tokens` tokens; `depth` caps the mix's chains."""
    if mix not in MIXES:
        raise DataError(f"unknown mix {mix!r}: one of {', '.join(MIXES)}")
    return build_world(rng, MIXES[mix], split, [_STATEMENTS] * chunks_for(tokens), max_depth=depth)


def fresh_value(rng: Random, split: str, taken: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """A value of the split that none of `taken` is; DataError when all are taken."""
    if set(values(split)) <= set(taken):
        raise DataError(f"the {split} split has {len(values(split))} values, all are taken")
    while True:
        value = pick(rng, values(split))
        if value not in taken:
            return value
