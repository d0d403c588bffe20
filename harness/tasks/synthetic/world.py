"""Names bound to values or to earlier names, and the questions about them.

A world has root facts, whose values are fresh in every turn, and statements, which never change. A statement binds
its name to a value (a constant) or to an earlier name (a link). The depth of a name is the number of hops to its
value; it is volatile when its chain ends in a root, so that KV cached in an earlier turn holds a stale answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from cacheslide.errors import DataError
from harness.tasks.synthetic.words import names, values

T = TypeVar("T")
Pair = tuple[str, str]


@dataclass(frozen=True)
class Mix:
    """Dependence between statements: share of constants, share of volatile links, deepest chain of each kind."""

    constants: float
    volatile: float
    volatile_depth: int
    stable_depth: int


MIXES = {
    "sparse": Mix(constants=0.4, volatile=0.5, volatile_depth=1, stable_depth=4),
    "deep": Mix(constants=0.2, volatile=0.5, volatile_depth=4, stable_depth=4),
}
VOLATILE_QUESTIONS = 0.4


@dataclass(frozen=True)
class Node:
    """A bound name. `target` is the index of the node it links to (None for roots and constants)."""

    name: Pair
    value: Pair | None
    target: int | None
    depth: int
    root: int | None


@dataclass(frozen=True)
class World:
    """`nodes` holds the roots first, then the statements; `chunks` the statement indices of each fixed document."""

    nodes: tuple[Node, ...]
    roots: int
    chunks: tuple[tuple[int, ...], ...]

    def chain(self, node: int) -> list[int]:
        """The nodes from `node` to the node with its value."""
        out = [node]
        while (target := self.nodes[out[-1]].target) is not None:
            out.append(target)
        return out

    def resolve(self, node: int, root_values: Sequence[Pair]) -> Pair:
        """The value that `node` has when the roots hold `root_values`."""
        end = self.nodes[self.chain(node)[-1]]
        return root_values[end.root] if end.root is not None else end.value


def pick(rng: Random, items: Sequence[T]) -> T:
    """One item. Only `Random.random` is documented to give the same numbers in every Python version."""
    return items[int(rng.random() * len(items))]


def draw(rng: Random, items: Sequence[T], n: int) -> list[T]:
    """`n` different items in random order."""
    pool = list(items)
    if n > len(pool):
        raise DataError(f"the synthetic task needs {n} different words, this split has {len(pool)}")
    for i in range(n):
        j = i + int(rng.random() * (len(pool) - i))
        pool[i], pool[j] = pool[j], pool[i]
    return pool[:n]


def build_world(
    rng: Random, mix: Mix, split: str, chunk_sizes: Sequence[int], roots: int = 8, max_depth: int = 9
) -> World:
    """Draw a world with `chunk_sizes` statements in its fixed documents; `max_depth` caps the mix (for curricula)."""
    by_second = names(split)
    seconds = draw(rng, list(by_second), roots + sum(chunk_sizes))
    pairs = [(pick(rng, by_second[s]), s) for s in seconds]
    nodes = [Node(pairs[i], None, None, 0, i) for i in range(roots)]
    ends = {(True, 0): list(range(roots))}
    chunks, limit = [], {True: min(mix.volatile_depth, max_depth), False: min(mix.stable_depth, max_depth)}
    for size in chunk_sizes:
        first = len(nodes)
        for _ in range(size):
            node = _statement(rng, mix, limit, pairs[len(nodes)], nodes, ends, split)
            ends.setdefault((node.root is not None, node.depth), []).append(len(nodes))
            nodes.append(node)
        chunks.append(tuple(range(first, len(nodes))))
    return World(tuple(nodes), roots, tuple(chunks))


def _statement(rng, mix, limit, name, nodes, ends, split) -> Node:
    volatile, depth = rng.random() < mix.volatile, 0
    if rng.random() >= mix.constants:
        # a link one hop deeper than an existing name of the wanted kind, or the nearest existing depth
        depth = 1 + int(rng.random() * limit[volatile])
        while depth and (volatile, depth - 1) not in ends:
            depth -= 1
    if not depth:
        return Node(name, pick(rng, values(split)), None, 0, None)
    target = pick(rng, ends[(volatile, depth - 1)])
    return Node(name, None, target, depth, nodes[target].root)


def draw_root_values(rng: Random, split: str, roots: int, before: Sequence[Pair] | None = None) -> list[Pair]:
    """Fresh values for the roots: all different, and neither word of a root's value is the one it had before."""
    while True:
        new = draw(rng, values(split), roots)
        if before is None or all(a != c and b != d for (a, b), (c, d) in zip(new, before, strict=True)):
            return new


def draw_questions(rng: Random, world: World, n: int) -> list[int]:
    """Up to `n` different statements to ask about: 40 % volatile ones where there are enough of both kinds."""
    statements = range(world.roots, len(world.nodes))
    kinds = {v: [i for i in statements if (world.nodes[i].root is not None) == v] for v in (True, False)}
    asked: list[int] = []
    while len(asked) < min(n, len(statements)):
        volatile = rng.random() < VOLATILE_QUESTIONS
        kind = kinds[volatile] or kinds[not volatile]
        asked.append(kind.pop(int(rng.random() * len(kind))))
    return asked
