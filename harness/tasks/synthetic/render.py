"""A world as text, in two styles: documents with sentences ("hotpotqa") and settings files ("swebench").

Text is made of *pieces*, strings that are one token each. In both styles a statement is six pieces,
name name verb word word end, so that a statement's words are at fixed offsets from its last piece, where the
training script supervises the resolved value (see harness/training/model.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

from harness.tasks.synthetic.words import FILLER
from harness.tasks.synthetic.world import Pair, World, pick

Pieces = tuple[str, ...]
STYLES = ("hotpotqa", "swebench")
CHUNK_TOKENS = (256, 330)
NOTES_FILLER = 12

_CONSTANT_VERBS = (" is", " equals", " holds", " means")
_LINK_VERBS = (" follows", " copies", " mirrors", " matches")
SYSTEM = {
    "hotpotqa": (*("Answer each question with the value that the name stands for .".replace(" ", "\0 ").split("\0")),),
    "swebench": (*("Fix each setting with the value that the name resolves to .".replace(" ", "\0 ").split("\0")),),
}
NOTES_TITLE = "Session notes"
NOTES_PATH = "log/current.ini"


@dataclass(frozen=True)
class Sentence:
    """A sentence or line. `node` is the world's node that it binds, None for filler."""

    pieces: Pieces
    node: int | None = None


@dataclass(frozen=True)
class Document:
    """The updated notes or a fixed document: a title (or path), head pieces that show it, and its sentences."""

    title: str
    head: Pieces
    sentences: tuple[Sentence, ...]

    def pieces(self) -> list[str]:
        """All pieces in order."""
        return [*self.head, *(p for s in self.sentences for p in s.pieces)]


@cache
def filler_pool(style: str) -> tuple[Pieces, ...]:
    """Sentences of ordinary words. Their seed is fixed: they hold no information of a split."""
    rng, out = Random("filler"), []
    for _ in range(4096):
        words = ["the", pick(rng, FILLER["who"]), pick(rng, FILLER["did"]), "the"]
        if rng.random() < 0.6:
            words.append(pick(rng, FILLER["how"]))
        words.append(pick(rng, FILLER["what"]))
        if rng.random() < 0.6:
            words += [pick(rng, FILLER["where"]), "the", pick(rng, FILLER["what"])]
        if rng.random() < 0.5:
            words.append(pick(rng, FILLER["when"]))
        body = tuple(" " + w for w in words)
        out.append((*body, " .") if style == "hotpotqa" else (" #", *body, "\n"))
    return tuple(out)


def statement(rng: Random, style: str, name: Pair, right: Pair, link: bool) -> Pieces:
    """The six pieces that bind `name` to a value, or link it to another name."""
    if style == "swebench":
        verb, end = (" ->" if link else " ="), "\n"
    else:
        verb, end = pick(rng, _LINK_VERBS if link else _CONSTANT_VERBS), " ."
    return (f" {name[0]}", f" {name[1]}", verb, f" {right[0]}", f" {right[1]}", end)


def fixed_documents(
    rng: Random, style: str, world: World, tokens: tuple[int, int] | None = CHUNK_TOKENS
) -> list[Document]:
    """The fixed documents: each chunk's statements in order, filler between them up to a length drawn from `tokens`."""
    out, used = [], set()
    for chunk in world.chunks:
        title, head = _heading(rng, style, used)
        body = [Sentence(_bind(rng, style, world, i, None), i) for i in chunk]
        if tokens:
            room = tokens[0] + int(rng.random() * (tokens[1] - tokens[0])) - len(head) - 6 * len(body)
            body = _mixed(rng, body, _filler(rng, style, tokens=room))
        out.append(Document(title, head, tuple(body)))
    return out


def notes_document(
    rng: Random, style: str, world: World, root_values: Sequence[Pair], filler: int = NOTES_FILLER
) -> Document:
    """The updated segment: the roots in random order among up to `filler` filler sentences."""
    roots = [Sentence(_bind(rng, style, world, i, root_values), i) for i in range(world.roots)]
    for i in range(len(roots) - 1, 0, -1):
        j = int(rng.random() * (i + 1))
        roots[i], roots[j] = roots[j], roots[i]
    body = _mixed(rng, roots, _filler(rng, style, count=int(rng.random() * (filler + 1))))
    if style == "hotpotqa":
        return Document(NOTES_TITLE, ("\n", "Session", " notes", ":"), tuple(body))
    return Document(NOTES_PATH, ("\n", "[", "start", " of", " log", "/", "current", ".", "ini", "]", "\n"), tuple(body))


def question(style: str, name: Pair) -> Pieces:
    """The question after the last document, before the answer's two words. Its last three pieces: name name verb."""
    a, b = f" {name[0]}", f" {name[1]}"
    if style == "hotpotqa":
        return ("\n", "Question", ":", " what", " is", a, b, " ?", "\n", "Answer", ":", a, b, " is")
    return ("\n", "Issue", ":", " resolve", a, b, "\n", "Patch", ":", a, b, " =")


def answer(value: Pair) -> Pieces:
    """The two pieces of an answer."""
    return (f" {value[0]}", f" {value[1]}")


def _bind(rng, style, world, index, root_values) -> Pieces:
    node = world.nodes[index]
    if node.target is not None:
        return statement(rng, style, node.name, world.nodes[node.target].name, link=True)
    value = root_values[node.root] if node.root is not None else node.value
    return statement(rng, style, node.name, value, link=False)


def _heading(rng, style, used) -> tuple[str, Pieces]:
    while True:
        if style == "hotpotqa":
            words = (pick(rng, FILLER["how"]), pick(rng, FILLER["what"]))
            title, head = " ".join(("Report", *words)), ("\n", "Report", *(f" {w}" for w in words), ":")
        else:
            a, b = str(int(rng.random() * 10)), str(int(rng.random() * 10))
            title, head = f"conf/{a}{b}.ini", ("\n", "[", "start", " of", " conf", "/", a, b, ".", "ini", "]", "\n")
        if title not in used:
            used.add(title)
            return title, head


def _filler(rng, style, tokens=None, count=None) -> list[Sentence]:
    pool, out = filler_pool(style), []
    while (tokens is not None and tokens > 0) or (count is not None and len(out) < count):
        out.append(Sentence(pick(rng, pool)))
        if tokens is not None:
            tokens -= len(out[-1].pieces)
    return out


def _mixed(rng, body, filler) -> list[Sentence]:
    """`filler` at random places within `body`, whose order is kept."""
    out, left, total = [], len(body), len(body) + len(filler)
    body, filler = iter(body), iter(filler)
    for rest in range(total, 0, -1):
        if rng.random() * rest < left:
            out.append(next(body))
            left -= 1
        else:
            out.append(next(filler))
    return out
