"""Entries in reading order: names with two fields, bound to values or to the content of another name's field.

A prompt reads `notes · documents · updates · documents`. Notes and updates are fresh in every turn, documents never
change. An entry sets one field of a name: to a word, or to the current content of that field of another name. A later
entry overrides an earlier one. So an entry's meaning depends on the entries before it and on their order.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

from harness.tasks.synthetic.words import MARK, MATERIAL, names
from harness.tasks.synthetic.world import Pair, draw, pick

FIELDS = ("make", "mark")
VALUES = (MATERIAL, MARK)
Slot = tuple[Pair, int]  # a name and the number of its field


@dataclass(frozen=True)
class Entry:
    """Sets field `field` of `name` to `value`, or to the current content of that field of `source`."""

    name: Pair
    field: int
    value: str | None = None
    source: Pair | None = None

    @property
    def slot(self) -> Slot:
        """The slot that it sets."""
        return self.name, self.field


@dataclass(frozen=True)
class Held:
    """Resolved content of an entry: a word, copied over `depth` entries."""

    value: str
    depth: int


@dataclass(frozen=True)
class Shape:
    """Parameters of prompts. Ranges are inclusive; the defaults are the task, other values make curricula.

    Attributes
    ----------
    entries : range of entries a document
    chunk_tokens : range of tokens a document, None for entries alone
    roots : names whose two fields the notes bind, as the updates bind `update_roots` others
    overruled : most slots of the documents before the updates that the updates set again
    links, volatile : share of entries that copy; of these, share that copies an entry of the turn's own text
    rebound : share of entries that set a slot again; after the updates, half of these a slot set by the updates
    depth : most entries that a copy goes through; `deeper` is the share of copies that aim for more than one
    notes_filler : most sentences without an entry in the notes, and in the updates
    lead, tail, joined, decoys : shares of sentences with words before, words after, two entries; of other sentences,
        share that mentions names
    forms : how many of a style's forms are used (all when None)
    """

    entries: tuple[int, int] = (7, 9)
    chunk_tokens: tuple[int, int] | None = (256, 330)
    roots: int = 6
    update_roots: int = 3
    overruled: int = 8
    links: float = 0.75
    volatile: float = 0.5
    rebound: float = 0.3
    depth: int = 3
    deeper: float = 0.25
    notes_filler: int = 24
    lead: float = 0.5
    tail: float = 0.9
    joined: float = 0.4
    decoys: float = 0.95
    forms: int | None = None


@dataclass(frozen=True)
class World:
    """Entries by segment, in reading order: `notes` and `updates` by turn, `before` and `behind` by document."""

    notes: tuple[tuple[Entry, ...], ...]
    before: tuple[tuple[Entry, ...], ...]
    updates: tuple[tuple[Entry, ...], ...]
    behind: tuple[tuple[Entry, ...], ...]

    def read(self, turn: int) -> list[tuple[Entry, ...]]:
        """The entries of all segments at `turn`."""
        return [self.notes[turn], *self.before, self.updates[turn], *self.behind]


def follow(entries: Iterable[Entry], held: dict[Slot, Held]) -> list[Held]:
    """Resolved content of each entry; updates `held`."""
    out = []
    for entry in entries:
        if entry.source is None:
            told = Held(entry.value, 0)
        else:
            copied = held[entry.source, entry.field]
            told = Held(copied.value, copied.depth + 1)
        held[entry.slot] = told
        out.append(told)
    return out


def build_world(rng: Random, split: str, documents: int, shape: Shape, turns: int = 2) -> World:
    """Draw a world of `documents` documents, half of them before the updates."""
    by_second = names(split)
    unused = [(pick(rng, by_second[s]), s) for s in draw(rng, list(by_second), len(by_second))]
    state: list[dict[Slot, Held]] = [{} for _ in range(turns)]
    notes = _roots(rng, [unused.pop() for _ in range(shape.roots)], turns, state)
    writer = _Writer(rng, shape, unused, state)
    before = tuple(writer.document() for _ in range(documents // 2))
    bound = list({e.slot for document in before for e in document})
    bound.sort()
    fresh = _roots(rng, [unused.pop() for _ in range(shape.update_roots)], turns, state)
    anew = []
    for turn in range(turns):
        slots = draw(rng, bound, min(shape.overruled, len(bound) // 2))
        entries = [Entry(name, f, _other(rng, f, [s[name, f].value for s in state])) for name, f in slots]
        follow(entries, state[turn])
        anew.append(tuple(entries))
    updates = tuple(a + b for a, b in zip(fresh, anew, strict=True))
    writer.overruled = sorted({e.slot for entries in anew for e in entries})
    behind = tuple(writer.document() for _ in range(documents - documents // 2))
    return World(notes, before, updates, behind)


def _roots(
    rng: Random, roots: Sequence[Pair], turns: int, state: list[dict[Slot, Held]]
) -> tuple[tuple[Entry, ...], ...]:
    """Entries of a turn's own names; a field's word differs between turns."""
    out: list[list[Entry]] = [[] for _ in range(turns)]
    for name in roots:
        for f in range(len(FIELDS)):
            for entries, value in zip(out, draw(rng, VALUES[f], turns), strict=True):
                entries.append(Entry(name, f, value))
    for entries, held in zip(out, state, strict=True):
        follow(entries, held)
    return tuple(tuple(entries) for entries in out)


def _other(rng: Random, field: int, taken: Sequence[str]) -> str:
    while (value := pick(rng, VALUES[field])) in taken:
        pass
    return value


class _Writer:
    """Draws the documents' entries in sequence and resolves them for every turn."""

    def __init__(self, rng: Random, shape: Shape, unused: list[Pair], state: list[dict[Slot, Held]]) -> None:
        self.rng, self.shape, self.unused, self.state = rng, shape, unused, state
        self.half: list[Slot] = []  # the missing field of names with one field set
        self.set: list[Slot] = []
        self.overruled: list[Slot] = []  # slots that the updates set again, in any turn

    def document(self) -> tuple[Entry, ...]:
        """One document's entries, each of another slot."""
        low, high = self.shape.entries
        out: list[Entry] = []
        for _ in range(low + int(self.rng.random() * (high - low + 1))):
            slot = self._slot({e.slot for e in out})
            if slot is None:
                break
            entry = self._entry(slot)
            for held in self.state:
                follow([entry], held)
            out.append(entry)
        return tuple(out)

    def _slot(self, here: set[Slot]) -> Slot | None:
        rng = self.rng
        again = [s for s in self.set if s not in here]
        whole = len(self.set) > len(self.half)  # a name with both fields set exists to ask about
        if self.half and not whole:
            return self._other_field()
        if again and (rng.random() < self.shape.rebound or not (self.half or self.unused)):
            late = [s for s in self.overruled if s not in here]
            return pick(rng, late if late and rng.random() < 0.5 else again)
        if self.half and (rng.random() < 0.6 or not self.unused):
            return self._other_field()
        if self.unused:
            field = int(rng.random() * 2)
            slot = self.unused.pop(), field
            self.half.append((slot[0], 1 - field))
            self.set.append(slot)
            return slot
        return None

    def _other_field(self) -> Slot:
        self.set.append(self.half.pop(int(self.rng.random() * len(self.half))))
        return self.set[-1]

    def _entry(self, slot: Slot) -> Entry:
        rng, shape, (name, field) = self.rng, self.shape, slot
        if rng.random() < shape.links and shape.depth:
            volatile, deep = rng.random() < shape.volatile, rng.random() < shape.deeper
            able = [s for s in self.state[0] if s[1] == field and s[0] != name and self._depth(s) < shape.depth]
            wanted = [s for s in able if self._volatile(s) == volatile and (self._depth(s) > 0) == deep]
            wanted = wanted or [s for s in able if self._volatile(s) == volatile] or able
            if wanted:
                return Entry(name, field, source=pick(rng, wanted)[0])
        return Entry(name, field, _other(rng, field, [s[slot].value for s in self.state if slot in s]))

    def _depth(self, slot: Slot) -> int:
        return max(s[slot].depth for s in self.state)

    def _volatile(self, slot: Slot) -> bool:
        return len({s[slot].value for s in self.state}) > 1
