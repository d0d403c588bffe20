"""Ledger prompts as task examples: two turns that share their documents, and questions about the second.

`system · session notes · documents · updates · documents · question`. A question asks for both fields of a name, so
that its two words were entered at different places; the answer is given by the last entries in reading order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from cacheslide.errors import DataError
from harness.tasks.example import Question, TaskExample, TextSegment
from harness.tasks.ledger.sentences import STYLES, Pieces, Sentence, entry_sentence, other_sentence, words
from harness.tasks.ledger.world import FIELDS, Entry, Held, Shape, Slot, World, build_world, follow
from harness.tasks.synthetic.words import FILLER, check_split
from harness.tasks.synthetic.world import Pair, pick

QUESTIONS = 8
TOKENS = (800, 8300)
_OVERHEAD, _CHUNK = 650, 306  # mean tokens of the prompt without documents, and of a document
SYSTEM = {
    "hotpotqa": "Read the entries in order : a later one overrules . Answer with make and mark of the name .",
    "swebench": "Read the settings in order : a later one overrules . Fix make and mark of the name .",
}
HEADS = {  # title, pieces
    "hotpotqa": (("Session notes", "\n|Session| notes|:"), ("Updates", "\n|Updates|:")),
    "swebench": (
        ("log/current.ini", "\n|[|start| of| log|/|current|.|ini|]|\n"),
        ("log/updates.ini", "\n|[|start| of| log|/|updates|.|ini|]|\n"),
    ),
}


@dataclass(frozen=True)
class Document:
    """A segment of a prompt: its title, the pieces of its head, its sentences; `updated` when fresh in every turn."""

    title: str
    head: Pieces
    sentences: tuple[Sentence, ...]
    updated: bool = False

    def pieces(self) -> list[str]:
        """All pieces in order."""
        return [*self.head, *(p for s in self.sentences for p in s.pieces)]

    def evidence(self) -> Iterator[tuple[Entry, int]]:
        """Its entries in reading order, with the offset of each one's evidence in `pieces`."""
        at = len(self.head)
        for sentence in self.sentences:
            yield from ((entry, at + offset) for entry, offset in sentence.entries)
            at += len(sentence.pieces)


@dataclass(frozen=True)
class Prompt:
    """A world, its documents by turn, the content of every slot at the end of each turn, and the names asked for."""

    id: str
    style: str
    world: World
    turns: tuple[tuple[Document, ...], ...]
    held: tuple[dict[Slot, Held], ...]
    asked: tuple[Pair, ...]


def documents_for(tokens: int) -> int:
    """How many documents a prompt of about `tokens` tokens has: 1 at 1k, 5 at 2k, 11 at 4k, 25 at 8k."""
    if not TOKENS[0] <= tokens <= TOKENS[1]:
        raise DataError(f"ledger prompts have {TOKENS[0]} to {TOKENS[1]} tokens, not {tokens}")
    return max(1, round((tokens - _OVERHEAD) / _CHUNK))


def draw_prompt(
    rng: Random,
    style: str,
    split: str,
    documents: int,
    shape: Shape,
    questions: int = QUESTIONS,
    turns: int = 2,
    name: str = "",
) -> Prompt:
    """One prompt; `rng` decides all of it."""
    world = build_world(rng, split, documents, shape, turns)
    named = sorted({e.name for turn in range(turns) for part in world.read(turn) for e in part})
    used: set[str] = set()
    fixed = [_report(rng, style, entries, named, shape, used) for entries in (*world.before, *world.behind)]
    shown, held = [], []
    for turn in range(turns):
        notes = _fresh(rng, style, HEADS[style][0], world.notes[turn], named, shape)
        updates = _fresh(rng, style, HEADS[style][1], world.updates[turn], named, shape)
        half = len(world.before)
        shown.append((notes, *fixed[:half], updates, *fixed[half:]))
        own: dict[Slot, Held] = {}
        for document in shown[-1]:
            follow((e for e, _ in document.evidence()), own)
        held.append(own)
    asked = _asked(rng, world, held, questions)
    return Prompt(name, style, world, tuple(shown), tuple(held), asked)


def prompts(style: str, split: str, seed: int, count: int, tokens: int, shape: Shape | None = None) -> Iterator[Prompt]:
    """Draw `count` prompts. The same arguments always give the same prompts."""
    if style not in STYLES:
        raise DataError(f"unknown style {style!r}: one of {', '.join(STYLES)}")
    check_split(split)
    for i in range(count):
        rng = Random(f"ledger-{style}-{split}-{seed}-{tokens}-{i}")
        yield draw_prompt(rng, style, split, documents_for(tokens), shape or Shape(), name=f"{split}-{i:05d}")


def system_pieces(style: str) -> Pieces:
    """The static system prompt."""
    first, *rest = SYSTEM[style].split(" ")
    return first, *(f" {w}" for w in rest)


def question(style: str, name: Pair) -> Pieces:
    """The question after the last document; the two words of the answer follow it."""
    if style == "hotpotqa":
        return ("\n", "Question", ":", " what", " is", *words(name), " ?", "\n", "Answer", ":", *words(name), " is")
    return ("\n", "Issue", ":", " resolve", *words(name), "\n", "Patch", ":", *words(name), " =")


def answer(prompt: Prompt, turn: int, name: Pair) -> tuple[str, ...]:
    """The words that answer a question about `name`, one per field."""
    return tuple(prompt.held[turn][name, f].value for f in range(len(FIELDS)))


def segments(style: str, documents: Sequence[Document]) -> tuple[TextSegment, ...]:
    """The prompt of one turn."""
    out = [TextSegment("system", "".join(system_pieces(style)), "reuse")]
    for d in documents:
        out.append(TextSegment(d.title, "".join(d.pieces()), "recompute" if d.updated else "reuse"))
    return tuple(out)


def example(prompt: Prompt, split: str) -> TaskExample:
    """The second turn's prompt, the first turn as `previous`, and the questions about the second."""
    before, now = (segments(prompt.style, documents) for documents in prompt.turns[:2])
    questions = []
    for k, name in enumerate(prompt.asked):
        told, was = answer(prompt, 1, name), answer(prompt, 0, name)
        depth = max(prompt.held[1][name, f].depth for f in range(len(FIELDS)))
        ask = "".join(question(prompt.style, name))
        questions.append(Question(f"{prompt.id}-t1-q{k}", ask, (" ".join(told),), depth, volatile=told != was))
    meta = {"style": prompt.style, "mix": "ledger", "split": split}
    return TaskExample(f"{prompt.id}-t1", f"ledger-{prompt.style}", now, before, tuple(questions), meta=meta)


def examples(style: str, split: str, seed: int, count: int, tokens: int) -> Iterator[TaskExample]:
    """Task examples; see `prompts`."""
    return (example(p, split) for p in prompts(style, split, seed, count, tokens))


def _asked(rng: Random, world: World, held: Sequence[dict[Slot, Held]], count: int) -> tuple[Pair, ...]:
    """Names that documents set in both fields, each at most once, in random order."""
    told = {e.slot for part in (*world.before, *world.behind) for e in part}
    able = sorted(n for n, f in told if f == 0 and (n, 1) in told)
    out: list[Pair] = []
    while able and len(out) < count:
        out.append(able.pop(int(rng.random() * len(able))))
    return tuple(out)


def _report(rng: Random, style: str, entries, named, shape: Shape, used: set[str]) -> Document:
    while True:
        if style == "hotpotqa":
            a, b = pick(rng, FILLER["how"]), pick(rng, FILLER["what"])
            title, head = f"Report {a} {b}", ("\n", "Report", f" {a}", f" {b}", ":")
        else:
            a, b = str(int(rng.random() * 10)), str(int(rng.random() * 10))
            title, head = f"conf/{a}{b}.ini", ("\n", "[", "start", " of", " conf", "/", a, b, ".", "ini", "]", "\n")
        if title not in used:
            used.add(title)
            break
    body = _told(rng, style, entries, named, shape)
    room = 0
    if shape.chunk_tokens:
        low, high = shape.chunk_tokens
        room = low + int(rng.random() * (high - low)) - len(head) - sum(len(s.pieces) for s in body)
    return Document(title, head, _mixed(rng, body, _others(rng, style, named, shape, room)))


def _fresh(rng: Random, style: str, heading: tuple[str, str], entries, named, shape: Shape) -> Document:
    order = list(entries)
    for i in range(len(order) - 1, 0, -1):
        j = int(rng.random() * (i + 1))
        order[i], order[j] = order[j], order[i]
    others = [other_sentence(rng, style, named, shape) for _ in range(int(rng.random() * (shape.notes_filler + 1)))]
    title, head = heading
    return Document(
        title, tuple(head.split("|")), _mixed(rng, _told(rng, style, order, named, shape), others), updated=True
    )


def _told(rng: Random, style: str, entries: Sequence[Entry], named: Sequence[Pair], shape: Shape) -> list[Sentence]:
    out, at = [], 0
    while at < len(entries):
        size = 2 if rng.random() < shape.joined else 1
        out.append(entry_sentence(rng, style, entries[at : at + size], named, shape))
        at += size
    return out


def _others(rng: Random, style: str, named, shape: Shape, room: int) -> list[Sentence]:
    out = []
    while room > 0:
        out.append(other_sentence(rng, style, named, shape))
        room -= len(out[-1].pieces)
    return out


def _mixed(rng: Random, body: list[Sentence], others: list[Sentence]) -> tuple[Sentence, ...]:
    """`others` at random places within `body`, whose order is kept."""
    out, left = [], len(body)
    here, there = iter(body), iter(others)
    for rest in range(len(body) + len(others), 0, -1):
        if rng.random() * rest < left:
            out.append(next(here))
            left -= 1
        else:
            out.append(next(there))
    return tuple(out)
