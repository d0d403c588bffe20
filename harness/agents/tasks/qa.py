"""Questions over fixed documents whose notes are sometimes out of date: a first answer is then wrong.

Before a stale question, one root's value changes in the world but not in the notes. The judge reveals it only after the
wrong answer; the second answer needs that correction and the same fixed documents, which now have another meaning.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from harness.agents.tasks.worlds import DEPTH, draw_tasks, fresh_value
from harness.tasks.synthetic import render
from harness.tasks.synthetic.prompts import text
from harness.tasks.synthetic.world import World, draw_root_values, pick

STALE = 0.6


@dataclass(frozen=True)
class QAQuestion:
    """A name and its value at the time of asking; `changed` root and its value `now`, "" when the notes are right."""

    name: str
    answer: str
    changed: str
    now: str


@dataclass(frozen=True)
class QATask:
    """Notes (updated slot), documents (fixed) and the questions in order."""

    id: str
    split: str
    notes: str
    documents: tuple[str, ...]
    questions: tuple[QAQuestion, ...]


def qa_tasks(
    split: str, seed: int, count: int, questions: int = 3, tokens: int = 512, mix: str = "deep", depth: int = DEPTH
) -> Iterator[QATask]:
    """Tasks of `questions` questions, see `draw_tasks`."""
    return draw_tasks("qa", draw_qa, split, seed, count, questions, tokens, mix, depth)


def draw_qa(
    rng: Random,
    name: str,
    split: str,
    world: World,
    questions: int,
    tokens: tuple[int, int] | None = render.CHUNK_TOKENS,
    filler: int = render.NOTES_FILLER,
) -> QATask:
    """A task over `world`; `tokens` and `filler` as in `render.fixed_documents` and `render.notes_document`."""
    documents = tuple(text(d.pieces()) for d in render.fixed_documents(rng, "hotpotqa", world, tokens))
    held = draw_root_values(rng, split, world.roots)
    notes = text(render.notes_document(rng, "hotpotqa", world, held, filler).pieces())
    nodes = range(world.roots, len(world.nodes))
    volatile = [n for n in nodes if world.nodes[n].root is not None]
    asked = []
    for _ in range(questions):
        stale = bool(volatile) and rng.random() < STALE
        node = pick(rng, volatile if stale else nodes)
        changed = now = ""
        if stale:
            root = world.nodes[node].root
            held[root] = fresh_value(rng, split, held)
            changed, now = " ".join(world.nodes[root].name), " ".join(held[root])
        answer = " ".join(world.resolve(node, held))
        asked.append(QAQuestion(" ".join(world.nodes[node].name), answer, changed, now))
    return QATask(name, split, notes, documents, tuple(asked))


def statement_about(documents: Sequence[str], name: str) -> str:
    """The sentence that binds `name`, or that there is none."""
    for document in documents:
        for sentence in document.split(" ."):
            words = sentence.rsplit(":", 1)[-1].split()
            if len(words) == 5 and " ".join(words[:2]) == name:
                return f"{' '.join(words)} ."
    return f"nothing about {name} ."
