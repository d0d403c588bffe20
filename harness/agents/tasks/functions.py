"""Jobs that need several calls: look up the numbers of names, combine them, hand in the result."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from random import Random

from harness.tasks.synthetic.words import check_split, names
from harness.tasks.synthetic.world import draw, pick

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "larger": max,
    "smaller": min,
}


@dataclass(frozen=True)
class Job:
    """`text` reads `get a b add c d larger e f`: start with a name, then an operation and a name each."""

    text: str
    result: int


@dataclass(frozen=True)
class FunctionTask:
    """The number of each name, and the jobs in order."""

    id: str
    split: str
    registers: dict[str, int]
    jobs: tuple[Job, ...]


@cache
def constants(split: str) -> tuple[int, ...]:
    """The three-digit numbers of a split; no number is in two."""
    check_split(split)
    shares = {"test": (9,), "validation": (8,), "train": range(8)}[split]
    return tuple(n for n in range(100, 1000) if hashlib.sha256(f"constant {n}".encode()).digest()[0] % 10 in shares)


def function_tasks(split: str, seed: int, count: int, jobs: int = 2, steps: int = 2) -> Iterator[FunctionTask]:
    """Draw `count` tasks of `jobs` jobs with 1 to `steps` operations each."""
    for i in range(count):
        rng = Random(f"agents-functions-{split}-{seed}-{jobs}-{steps}-{i}")
        yield draw_functions(rng, f"functions-{split}-{seed}-{i:05d}", split, jobs, steps)


def draw_functions(rng: Random, name: str, split: str, jobs: int, steps: int) -> FunctionTask:
    """One task."""
    by_second = names(split)
    seconds = draw(rng, list(by_second), jobs * (steps + 1))
    held = {f"{pick(rng, by_second[s])} {s}": pick(rng, constants(split)) for s in seconds}
    free, made = list(held), []
    for _ in range(jobs):
        operand = free.pop()
        said, result = f"get {operand}", held[operand]
        for _ in range(1 + int(rng.random() * steps)):
            operand, operation = free.pop(), pick(rng, tuple(OPERATIONS))
            said, result = f"{said} {operation} {operand}", OPERATIONS[operation](result, held[operand])
        made.append(Job(said, result))
    return FunctionTask(name, split, held, tuple(made))
