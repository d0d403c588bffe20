"""Synthetic prompts as task examples: two turns that share their fixed documents, and questions about the second."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from cacheslide.errors import DataError
from harness.tasks.example import Question, TaskExample, TextSegment
from harness.tasks.synthetic import render
from harness.tasks.synthetic.world import (
    MIXES,
    Pair,
    World,
    build_world,
    draw_questions,
    draw_root_values,
)

QUESTIONS = 8
STATEMENTS = (9, 11)
TOKENS = (400, 4300)
_OVERHEAD, _CHUNK = 140, 297  # mean tokens of system, notes and question together, and of a document


@dataclass(frozen=True)
class Prompt:
    """A world, its fixed documents, and per turn the notes, the roots' values and the nodes asked about."""

    id: str
    style: str
    world: World
    documents: tuple[render.Document, ...]
    notes: tuple[render.Document, render.Document]
    values: tuple[list[Pair], list[Pair]]
    asked: tuple[int, ...]


def chunks_for(tokens: int) -> int:
    """How many fixed documents a prompt of about `tokens` tokens has: 1 at 512, 3 at 1k, 6 at 2k, 13 at 4k."""
    if not TOKENS[0] <= tokens <= TOKENS[1]:
        raise DataError(f"synthetic prompts have {TOKENS[0]} to {TOKENS[1]} tokens, not {tokens}")
    return max(1, round((tokens - _OVERHEAD) / _CHUNK))


def prompts(style: str, mix: str, split: str, seed: int, count: int, tokens: int) -> Iterator[Prompt]:
    """Draw `count` prompts. The same arguments always give the same prompts."""
    if style not in render.STYLES:
        raise DataError(f"unknown style {style!r}: one of {', '.join(render.STYLES)}")
    if mix not in MIXES:
        raise DataError(f"unknown mix {mix!r}: one of {', '.join(MIXES)}")
    for i in range(count):
        rng = Random(f"{style}-{mix}-{split}-{seed}-{tokens}-{i}")
        low, high = STATEMENTS
        sizes = [low + int(rng.random() * (high - low + 1)) for _ in range(chunks_for(tokens))]
        world = build_world(rng, MIXES[mix], split, sizes)
        documents = tuple(render.fixed_documents(rng, style, world))
        before = draw_root_values(rng, split, world.roots)
        now = draw_root_values(rng, split, world.roots, before)
        notes = tuple(render.notes_document(rng, style, world, v) for v in (before, now))
        asked = tuple(draw_questions(rng, world, QUESTIONS))
        yield Prompt(f"{split}-{i:05d}", style, world, documents, notes, (before, now), asked)


def text(pieces) -> str:
    """Pieces as text."""
    return "".join(pieces)


def segments(style: str, notes: str, documents: list[tuple[str, str]]) -> tuple[TextSegment, ...]:
    """The prompt template: system, updated notes, then the fixed documents as (title, text)."""
    return (
        TextSegment("system", text(render.SYSTEM[style]), "reuse"),
        TextSegment(render.NOTES_TITLE if style == "hotpotqa" else render.NOTES_PATH, notes, "recompute"),
        *(TextSegment(title, body, "reuse") for title, body in documents),
    )


def examples(style: str, mix: str, split: str, seed: int, count: int, tokens: int) -> Iterator[TaskExample]:
    """Task examples: the second turn's prompt, the first turn as `previous`, and the questions about the second."""
    for prompt in prompts(style, mix, split, seed, count, tokens):
        world, documents = prompt.world, [(d.title, text(d.pieces())) for d in prompt.documents]
        old, new = (segments(style, text(n.pieces()), documents) for n in prompt.notes)
        questions = []
        for k, node in enumerate(prompt.asked):
            bound = world.nodes[node]
            answer = " ".join(world.resolve(node, prompt.values[1]))
            ask = text(render.question(style, bound.name))
            questions.append(
                Question(f"{prompt.id}-t1-q{k}", ask, (answer,), bound.depth, volatile=bound.root is not None)
            )
        meta = {"style": style, "mix": mix, "split": split}
        yield TaskExample(f"{prompt.id}-t1", f"synthetic-{style}", new, old, tuple(questions), meta=meta)
