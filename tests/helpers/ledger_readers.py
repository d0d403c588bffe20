"""Two readers of ledger prompts that share nothing with the generator: one of the text, one of half-stale entries."""

import re

from harness.tasks.ledger.prompts import Document, Prompt
from harness.tasks.ledger.world import FIELDS
from harness.tasks.synthetic.words import FIRST, MARK, MATERIAL, SECOND

_N = rf"(?:{'|'.join(FIRST)}) (?:{'|'.join(SECOND)})"
_S, _R, _F = rf"(?P<s>{_N})", rf"(?P<r>{_N})", r"(?P<f>make|mark)"
_V = rf"(?P<v>{'|'.join((*MATERIAL, *MARK))})"
PATTERNS = [
    re.compile(rf"(?<![\w]){p}(?![\w])")
    for p in (
        rf"{_S} has {_F} {_V}",
        rf"the {_F} of {_S} is {_V}",
        rf"{_V} is the {_F} of {_S}",
        rf"for {_S} they put {_V} as {_F}",
        rf"{_S} got {_V} in {_F}",
        rf"the {_F} {_V} and {_S} were joined",
        rf"{_S} and {_F} and {_V} got entered",
        rf"{_S} takes its {_F} from {_R}",
        rf"{_R} lends its {_F} to {_S}",
        rf"{_S} is like {_R} in {_F}",
        rf"as {_R} has it , so {_S} has its {_F}",
        rf"{_S} and {_R} in {_F} were matched",
        rf"from {_R} the {_F} of {_S} was copied",
        rf"{_R} to {_S} the {_F} got passed",
        rf"{_S} / {_F} = {_V}",
        rf"{_F} \( {_S} \) = {_V}",
        rf"set {_F} : {_V} for {_S}",
        rf"{_V} >> {_S} / {_F}",
        rf"let {_S} be {_V} in {_F}",
        rf"{_S} {_F} {_V} :: put",
        rf"\( {_S} , {_F} , {_V} \) => keep",
        rf"{_S} / {_F} -> {_R}",
        rf"copy {_F} : {_R} to {_S}",
        rf"let {_S} be {_R} in {_F}",
        rf"{_R} >> {_S} / {_F}",
        rf"{_S} {_F} {_R} :: link",
        rf"\( {_S} , {_F} , {_R} \) => join",
        rf"{_R} {_F} {_S} :: push",
    )
]


def read_text(text: str) -> dict[tuple[str, str], str]:
    """What every (name, field) holds at the end of a prompt's text."""
    found = []
    for pattern in PATTERNS:
        found += [(m.start(), m.groupdict()) for m in pattern.finditer(text)]
    held: dict[tuple[str, str], str] = {}
    for _, told in sorted(found, key=lambda x: x[0]):
        value = told["v"] if told.get("v") else held[told["r"], told["f"]]
        held[told["s"], told["f"]] = value
    return held


def answers_with(prompt: Prompt, chosen: set[tuple[str, int]]) -> list[tuple[str, ...]]:
    """Answers of an ideal reader whose entries in documents are those of turn 0, unless their evidence is `chosen`.

    `chosen` holds (title, offset of the evidence in the document). Notes and updates are read anew. Of several entries
    of a slot it reads the last.
    """

    def told(documents: tuple[Document, ...], stale: dict | None) -> tuple[dict, dict]:
        held: dict = {}
        by_place: dict = {}
        for d in documents:
            for entry, at in d.evidence():
                if stale is not None and not d.updated and (d.title, at) not in chosen:
                    value = stale[d.title, at]
                else:
                    value = entry.value if entry.source is None else held[entry.source, entry.field]
                held[entry.slot] = by_place[d.title, at] = value
        return held, by_place

    _, before = told(prompt.turns[0], None)
    held, _ = told(prompt.turns[1], before)
    return [tuple(held[name, f] for f in range(len(FIELDS))) for name in prompt.asked]
