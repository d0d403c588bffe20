"""A chat of several sessions: earlier sessions refer to persona facts, and the user changes those facts."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

from harness.agents.tasks.worlds import DEPTH, draw_tasks, fresh_value
from harness.tasks.synthetic import render
from harness.tasks.synthetic.prompts import text
from harness.tasks.synthetic.world import World, draw_root_values, pick

CAPACITY = 6
TELL = 0.4


@dataclass(frozen=True)
class ChatTurn:
    """The user tells a name's new value, or asks for a name's value."""

    kind: Literal["tell", "ask"]
    name: str
    value: str


@dataclass(frozen=True)
class ChatTask:
    """Persona facts (oldest first), earlier sessions (fixed), the memory's capacity in facts, the user's turns."""

    id: str
    split: str
    persona: tuple[tuple[str, str], ...]
    sessions: tuple[str, ...]
    capacity: int
    turns: tuple[ChatTurn, ...]


def chat_tasks(
    split: str, seed: int, count: int, turns: int = 6, tokens: int = 512, mix: str = "deep", depth: int = DEPTH
) -> Iterator[ChatTask]:
    """Tasks of `turns` turns, the last of which is always a question; see `draw_tasks`."""
    return draw_tasks("chat", draw_chat, split, seed, count, turns, tokens, mix, depth)


def draw_chat(
    rng: Random,
    name: str,
    split: str,
    world: World,
    turns: int,
    tokens: tuple[int, int] | None = render.CHUNK_TOKENS,
) -> ChatTask:
    """A task over `world`; `tokens` as in `render.fixed_documents`."""
    sessions = []
    for number, document in enumerate(render.fixed_documents(rng, "hotpotqa", world, tokens), 1):
        said = "".join(text(s.pieces) for s in document.sentences)
        sessions.append(f"\nSession {number}:{said}")
    held = draw_root_values(rng, split, world.roots)
    roots = [" ".join(n.name) for n in world.nodes[: world.roots]]
    persona = tuple((root, " ".join(value)) for root, value in zip(roots, held, strict=True))
    out = []
    for k in range(turns):
        if k < turns - 1 and rng.random() < TELL:
            root = int(rng.random() * world.roots)
            held[root] = fresh_value(rng, split, held)
            out.append(ChatTurn("tell", roots[root], " ".join(held[root])))
        else:
            node = pick(rng, range(world.roots, len(world.nodes)))
            out.append(ChatTurn("ask", " ".join(world.nodes[node].name), " ".join(world.resolve(node, held))))
    return ChatTask(name, split, persona, tuple(sessions), CAPACITY, tuple(out))
