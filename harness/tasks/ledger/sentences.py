"""Entries as sentences of many forms, in two styles: reports ("hotpotqa") and settings files ("swebench").

Text is made of *pieces*, strings that are one token each. An entry states its name, its field and its source or
value, in an order set by the form. Its *evidence* is the word at which it is fully known: a word of a name, a field, a
value or a verb, with words after it. The same words also occur in sentences without an entry.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

from harness.tasks.ledger.world import FIELDS, VALUES, Entry, Shape
from harness.tasks.synthetic.render import filler_pool
from harness.tasks.synthetic.words import FILLER
from harness.tasks.synthetic.world import Pair, pick

Pieces = tuple[str, ...]
STYLES = ("hotpotqa", "swebench")

# S: the name that is set, R: the name that is copied, F: the field, V: a value. The evidence is the last of these, or
# the word after the *, which distinguishes an entry from the sentence of DECOYS with the same beginning.
SETS = {
    "hotpotqa": (
        "S has F V",
        "the F of S is V",
        "V is the F of S",
        "for S they put V as F",
        "S got V in F",
        "the F V and S were *joined",
        "S and F and V got *entered",
    ),
    "swebench": (
        "S / F = V",
        "F ( S ) = V",
        "set F : V for S",
        "V >> S / F",
        "let S be V in F",
        "S F V :: *put",
        "( S , F , V ) => *keep",
    ),
}
COPIES = {
    "hotpotqa": (
        "S takes its F from R",
        "R lends its F to S",
        "S is like R in F",
        "as R has it , so S has its F",
        "S and R in F were *matched",
        "from R the F of S was *copied",
        "R to S the F got *passed",
    ),
    "swebench": (
        "S / F -> R",
        "copy F : R to S",
        "let S be R in F",
        "R >> S / F",
        "S F R :: *link",
        "( S , F , R ) => *join",
        "R F S :: *push",
    ),
}
DECOYS = {
    "hotpotqa": (
        "S stood near R",
        "R and S were sold for V",
        "the WHO asked S about a F",
        "V and a F were seen by R",
        "the F V and S were weighed",
        "S and F and V got dropped",
        "S and R in F were named",
        "from R the F of S was hidden",
        "R to S the F got denied",
    ),
    "swebench": (
        "# S near R",
        "# todo : V or F ?",
        "drop S , R",
        "assert S != R",
        "S F V :: cut",
        "( S , F , V ) => void",
        "S F R :: diff",
        "( S , F , R ) => skip",
        "R F S :: peek",
    ),
}
LEADS = {
    "hotpotqa": ("WHEN", "WHEN ,", "the WHO wrote that", "as the WHO told the WHO ,", "near the HOW WHAT"),
    "swebench": ("if WHAT :", "@ WHEN", "try :"),
}
TAILS = {
    "hotpotqa": (
        "WHEN",
        "as the WHO DID",
        "WHERE the WHAT",
        ", which the WHO DID WHEN",
        "while N left WHEN",
        "long before N and the WHO DID the WHAT",
        "before the WHO DID the HOW WHAT WHERE the WHAT",
        "and the WHO DID a HOW WHAT and the WHO DID the WHAT WHEN",
    ),
    "swebench": (
        "# WHEN",
        "# the WHO DID",
        "# WHERE the WHAT",
        "# see HOW WHAT WHERE the WHAT",
        "# not N WHEN",
        "# as N and the WHO DID the WHAT",
        "# the WHO DID the HOW WHAT WHERE the WHAT WHEN",
    ),
}
JOINTS = {"hotpotqa": ("and", "while", ", but"), "swebench": (";", "&&")}
ENDS = {"hotpotqa": " .", "swebench": "\n"}
# Words drawn from a list; N is any name of the prompt.
_LISTS = {"WHO": "who", "DID": "did", "HOW": "how", "WHAT": "what", "WHERE": "where", "WHEN": "when"}


@dataclass(frozen=True)
class Sentence:
    """Pieces, and entries with the offset of each one's evidence."""

    pieces: Pieces
    entries: tuple[tuple[Entry, int], ...] = ()


def entry_clause(rng: Random, style: str, entry: Entry, shape: Shape) -> tuple[Pieces, int]:
    """An entry in one of its forms, and the offset of its evidence."""
    form = pick(rng, (SETS if entry.source is None else COPIES)[style][: shape.forms])
    pieces: list[str] = []
    evidence = 0
    for word in form.split(" "):
        if word in ("S", "R"):
            pieces += words(entry.name if word == "S" else entry.source)
        else:
            pieces.append(" " + {"F": FIELDS[entry.field], "V": entry.value or ""}.get(word, word.removeprefix("*")))
        if word in ("S", "R", "F", "V") or word.startswith("*"):
            evidence = len(pieces) - 1
    return tuple(pieces), evidence


def entry_sentence(rng: Random, style: str, entries: Sequence[Entry], named: Sequence[Pair], shape: Shape) -> Sentence:
    """One or more entries in one sentence, with or without words before and after."""
    pieces: list[str] = []
    told = []
    if rng.random() < shape.lead:
        pieces += _filled(rng, pick(rng, LEADS[style]))
    for number, entry in enumerate(entries):
        if number:
            pieces += _filled(rng, pick(rng, JOINTS[style]))
        clause, evidence = entry_clause(rng, style, entry, shape)
        told.append((entry, len(pieces) + evidence))
        pieces += clause
    if rng.random() < shape.tail:
        pieces += _filled(rng, pick(rng, TAILS[style]), named)
    return Sentence((*pieces, ENDS[style]), tuple(told))


def other_sentence(rng: Random, style: str, named: Sequence[Pair], shape: Shape) -> Sentence:
    """A sentence without an entry; a share of them mentions `named` names, fields and values."""
    if rng.random() >= shape.decoys or not named:
        return Sentence(pick(rng, filler_pool(style)))
    pieces: list[str] = []
    if rng.random() < shape.lead:
        pieces += _filled(rng, pick(rng, LEADS[style]))
    field = int(rng.random() * len(FIELDS))
    for word in pick(rng, DECOYS[style]).split(" "):
        if word in ("S", "R"):
            pieces += words(pick(rng, named))
        else:
            pieces += _filled(rng, {"F": FIELDS[field], "V": pick(rng, VALUES[field])}.get(word, word))
    if rng.random() < shape.tail:
        pieces += _filled(rng, pick(rng, TAILS[style]), named)
    return Sentence((*pieces, ENDS[style]))


def words(name: Pair) -> Pieces:
    """A name's two pieces."""
    return f" {name[0]}", f" {name[1]}"


def _filled(rng: Random, form: str, named: Sequence[Pair] = ()) -> list[str]:
    out: list[str] = []
    for w in form.split(" "):
        out += words(pick(rng, named)) if w == "N" else [" " + (pick(rng, FILLER[_LISTS[w]]) if w in _LISTS else w)]
    return out


@cache
def form_pieces() -> frozenset[str]:
    """Every piece of a form that is not drawn from a list of words."""
    forms = (SETS, COPIES, DECOYS, LEADS, TAILS, JOINTS)
    told = {w for group in forms for style in STYLES for form in group[style] for w in form.split(" ")}
    told = {w.removeprefix("*") for w in told}
    return frozenset(f" {w}" for w in told - {"S", "R", "F", "V", "N", *_LISTS}) | set(ENDS.values())
