"""Prompts on real passages, in settings of increasing difficulty: `[head][notes][passages][question]`.

The notes are the updated text of a turn; the turn that filled the cache had notes of other text and length.

unrelated    the notes are unrelated to the question
matter       the notes hold a passage needed for the question
shift        the notes have grown by 100 to 2,000 tokens
contradict   the notes state that the passages' answer is wrong

A prompt depends only on its row, its setting and a seed, so that all machines make the same prompts.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.core.tokenizing import opening
from cacheslide.errors import DataError
from harness.backends.tokens import Tokens
from harness.tasks.passages import PassageRow, answer_passages

SETTINGS = ("unrelated", "matter", "shift", "contradict")
SHIFTS = (100, 500, 1000, 2000)
LENGTHS = (2000, 3400, 6000)
NOTES = (40, 400)
ANSWER = 24  # maximum target tokens
CORRECTION = 'Correction: the passages are out of date. Wherever they say "{old}", it is "{new}" now.\n\n'
HEAD = "Read the notes and the passages and answer the question at the end with the shortest answer.\n\n"


@dataclass(frozen=True)
class Trial:
    """One prompt, the prompt of the turn before it, and the answer whose tokens are the targets.

    `about` holds its description for records: ids, hashes and lengths, no text.
    """

    id: str
    dataset: str
    previous: Prompt
    prompt: Prompt
    answer: tuple[int, ...]
    about: dict[str, Any] = field(default_factory=dict)


class Builder:
    """Makes trials of the rows of one data set.

    Parameters
    ----------
    tokens : Tokens
        The model's tokenizer.
    rows : sequence of PassageRow
    seed : int
    lengths : sequence of int
        Tokens of fixed text; trials cycle through them.
    """

    def __init__(
        self, tokens: Tokens, rows: Sequence[PassageRow], seed: int = 0, lengths: Sequence[int] = LENGTHS
    ) -> None:
        if len(rows) < 2:
            raise DataError("a setting needs rows whose text is none of the question's: at least two rows")
        self.tokens, self.rows, self.seed, self.lengths = tokens, rows, seed, lengths
        self._ids: dict[str, tuple[int, ...]] = {}

    def trial(self, setting: str, index: int) -> Trial | None:
        """The trial of row `index`; None if the row does not suit the setting.

        That is, if no passage holds its answer, or if no row has a different answer to state instead.
        """
        if setting not in SETTINGS:
            raise DataError(f"unknown setting {setting!r} (known: {', '.join(SETTINGS)})")
        row = self.rows[index]
        rng = random.Random(f"{self.seed} {setting} {row.sha256}")
        answer = self.encode(" " + row.answers[0])[:ANSWER]
        needed = list(row.gold) or list(answer_passages(row))
        if not needed:
            return None
        length = self.lengths[index % len(self.lengths)]
        moved = rng.choice(needed) if setting == "matter" else None
        fixed = self._fixed(row, needed, moved, length, rng)
        before = self.filler(row, rng.randint(*NOTES), rng)
        now, shift = self.filler(row, rng.randint(*NOTES), rng), None
        if setting == "shift":
            shift = SHIFTS[index % len(SHIFTS)]
            now = before + self.filler(row, shift, rng)
        elif moved is not None:
            now = self.encode(row.passages[moved].strip() + "\n\n")
        elif setting == "contradict":
            accepted = {a.lower() for a in row.answers}
            others = [r.answers[0] for r in self.rows if r.answers[0].lower() not in accepted]
            if not others:
                return None
            other = rng.choice(others)
            text = CORRECTION.format(old=row.answers[0], new=other)
            now, answer = now + self.encode(text), self.encode(" " + other)[:ANSWER]
        question = self.encode(f"Question: {row.question}\nAnswer:")
        about = {
            "row": row.id, "row_sha256": row.sha256, "fixed_tokens": sum(map(len, fixed)), "passages": len(fixed),
            "notes_before": len(before), "notes_tokens": len(now), "shift": len(now) - len(before), "grown": shift,
        }  # fmt: skip
        previous, prompt = self.prompt(before, fixed, question), self.prompt(now, fixed, question)
        return Trial(f"{setting} {row.dataset} {row.id}", row.dataset, previous, prompt, answer, about)

    def prompt(self, notes: Sequence[int], fixed: Sequence[Sequence[int]], question: Sequence[int]) -> Prompt:
        """Head and passages are fixed, one segment per passage; notes and question are updated text."""
        head = opening(self.tokens.tokenizer) + self.encode(HEAD)
        parts = [Segment(head, Role.REUSE, "head"), Segment(tuple(notes), Role.RECOMPUTE, "notes")]
        parts += [Segment(tuple(p), Role.REUSE, f"passage {i}") for i, p in enumerate(fixed)]
        return Prompt((*parts, Segment(tuple(question), Role.RECOMPUTE, "question")))

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of `text`, memoized: passages recur in many trials."""
        if text not in self._ids:
            self._ids[text] = self.tokens.encode(text)
        return self._ids[text]

    def passage(self, text: str) -> tuple[int, ...]:
        """A passage as a segment."""
        return self.encode(text.strip() + "\n\n")

    def filler(self, row: PassageRow, count: int, rng: random.Random) -> tuple[int, ...]:
        """`count` tokens of other rows' passages."""
        out: tuple[int, ...] = ()
        while len(out) < count:
            out += self.passage(self._other(row, rng))
        newline = self.encode("\n\n")
        return out[: count - len(newline)] + newline

    def _other(self, row: PassageRow, rng: random.Random) -> str:
        """A passage of another row that neither is one of this row's nor holds its answer."""
        for _ in range(1000):
            other = rng.choice(self.rows)
            text = rng.choice(other.passages)
            fresh = other.sha256 != row.sha256 and text not in row.passages
            if fresh and row.answers[0].lower() not in text.lower():
                return text
        raise DataError(f"row {row.id}: no other row has a passage without its answer")

    def _fixed(
        self, row: PassageRow, needed: Sequence[int], moved: int | None, length: int, rng: random.Random
    ) -> list[tuple[int, ...]]:
        """About `length` tokens of passages: `needed` without `moved`, the row's others, other rows'; shuffled."""
        own = [i for i in range(len(row.passages)) if i not in needed]
        rng.shuffle(own)
        out = [self.passage(row.passages[i]) for i in needed if i != moved]
        total = sum(map(len, out))
        while total < length:
            passage = self.passage(row.passages[own.pop()] if own else self._other(row, rng))
            out.append(passage[: max(32, length - total)])
            total += len(out[-1])
        rng.shuffle(out)
        return out
