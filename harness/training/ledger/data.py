"""Training rows of the ledger task: a prompt with several answered questions, as ids with labels.

A label is at the evidence of every entry, and at a question's two tokens that precede its answer. Rows are drawn by
worker processes; each is used several times, every time with other names and values, so that only its sentence forms
repeat.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from harness.tasks.ledger.prompts import Prompt, answer, draw_prompt, question, system_pieces
from harness.tasks.ledger.sentences import STYLES, Sentence
from harness.tasks.ledger.world import FIELDS, Shape
from harness.tasks.synthetic.words import MARK, MATERIAL, SECOND, names
from harness.training.ledger.tokens import ledger_tokenizer

NONE = -100
SET, COPY, ASK = range(3)
# Offsets in the row (of the label, of its entry's words, of the entry that it copies or asks for), then words.
FIELDS_OF_LABEL = ("at", "kind", "subject_at", "source_at", "field_at", "look_at", "depth", "subject", "source", "held")
WORDS = slice(7, 10)


@dataclass(frozen=True)
class RowSpec:
    """Rows of a curriculum stage: prompts of `documents` documents of a shape, in batches of `batch` x `length`."""

    shape: Shape
    documents: tuple[int, int]
    length: int
    batch: int
    questions: int = 8
    weight: float = 1.0


@dataclass(frozen=True)
class Row:
    """Ids [n], labels [m, fields], and per question (offset of the token in front of the answer)."""

    ids: np.ndarray
    labels: np.ndarray
    asked: np.ndarray


def prompt_rows(rng: Random, spec: RowSpec, split: str, style: str | None = None, turns: int = 2) -> Iterator[Row]:
    """One prompt's turns as rows; a turn that does not fit into `spec.length` is left out."""
    low, high = spec.documents
    style = style or STYLES[rng.random() < 0.5]
    drawn = low + int(rng.random() * (high - low + 1))
    prompt = draw_prompt(rng, style, split, drawn, spec.shape, spec.questions, turns)
    for turn in range(turns):
        row = _row(prompt, turn, spec.length)
        if row is not None:
            yield row


def _row(prompt: Prompt, turn: int, room: int) -> Row | None:
    tokenizer, table = ledger_tokenizer()
    ids = [tokenizer.token_to_id("<s>"), *(table[p] for p in system_pieces(prompt.style))]
    labels, latest, held = [], {}, {}
    for document in prompt.turns[turn]:
        ids += [table[p] for p in document.head]
        for sentence in document.sentences:
            for entry, label in _labels(sentence, len(ids), latest, held, table):
                labels.append(label)
                latest[entry.slot] = label[0]
            ids += [table[p] for p in sentence.pieces]
    if len(ids) > room:
        return None
    asked, end = [], tokenizer.token_to_id("</s>")
    for name in prompt.asked:
        words = answer(prompt, turn, name)
        text = [table[p] for p in question(prompt.style, name)]
        if len(ids) + len(text) + 3 > room:
            break
        ids += text
        asked.append(len(ids) - 1)
        for f, word in enumerate(words):
            at, told = len(ids) - 1, latest[name, f]
            depth = prompt.held[turn][name, f].depth
            second = at - 1 - f
            subject = table[f" {name[1]}"]
            labels.append((at, ASK, second, NONE, NONE, told, depth, subject, NONE, table[f" {word}"]))
            ids.append(table[f" {word}"])
        ids.append(end)
    if not asked:
        return None
    return Row(np.asarray(ids, np.int32), np.asarray(labels, np.int32), np.asarray(asked, np.int32))


def _labels(sentence: Sentence, start: int, latest: dict, held: dict, table: dict[str, int]):
    """Each entry of a sentence with its label; `held` is updated."""
    begin = 0
    for entry, offset in sentence.entries:
        words = [p.strip() for p in sentence.pieces]
        clause = range(begin, offset + 1)

        def place(word: str, clause=clause, words=words) -> int:
            return start + max(i for i in clause if words[i] == word)

        subject, copied = entry.name[1], entry.source[1] if entry.source else None
        depth, value, look = 0, entry.value, NONE
        if copied:
            depth, value = held[entry.source, entry.field]
            depth, look = depth + 1, latest[entry.source, entry.field]
        held[entry.slot] = depth, value
        told = (place(subject), place(copied or entry.value), place(FIELDS[entry.field]), look, depth)
        named = (table[f" {subject}"], table[f" {copied}"] if copied else NONE, table[f" {value}"])
        yield entry, (start + offset, COPY if copied else SET, *told, *named)
        begin = offset + 1


class Relabel:
    """Replaces a row's names and values: each second word by any other, with a first word that the split allows."""

    def __init__(self, vocab: int, split: str = "train") -> None:
        _, table = ledger_tokenizer()
        allowed = names(split)
        self.seconds = np.array([table[f" {s}"] for s in SECOND if s in allowed])
        self.values = [np.array([table[f" {w}"] for w in group]) for group in (MATERIAL, MARK)]
        self.named = np.zeros(vocab, bool)
        self.named[self.seconds] = True
        firsts = [[table[f" {f}"] for f in allowed[s]] for s in SECOND if s in allowed]
        self.counts = np.array([len(f) for f in firsts])
        self.firsts = np.zeros((len(firsts), max(self.counts)), np.int32)
        for i, group in enumerate(firsts):
            self.firsts[i, : len(group)] = group
        self.vocab = vocab

    def __call__(self, row: Row, rng: np.random.Generator) -> Row:
        """The same row in other words."""
        words = np.arange(self.vocab + 1, dtype=np.int32)
        for group in (self.seconds, *self.values):
            words[group] = rng.permutation(group)
        ids = words[row.ids]
        chosen = self.firsts[np.arange(len(self.counts)), (rng.random(len(self.counts)) * self.counts).astype(int)]
        first = np.zeros(self.vocab, np.int32)
        first[self.seconds] = chosen
        at = self.named[row.ids].nonzero()[0]
        ids[at - 1] = first[ids[at]]
        labels = row.labels.copy()
        told = labels[:, WORDS]
        labels[:, WORDS] = np.where(told == NONE, NONE, words[told])
        return Row(ids, labels, row.asked)


def collate(rows: list[Row], length: int) -> dict[str, Tensor]:
    """`ids` [batch, length]; labels by name [batch, m], padded with `NONE`; `asked` [batch, questions]."""
    ids = np.zeros((len(rows), length), np.int64)  # 0 is the padding's id
    most, questions = max(len(r.labels) for r in rows), max(len(r.asked) for r in rows)
    most += -most % 32  # few shapes
    labels = np.full((len(rows), most, len(FIELDS_OF_LABEL)), NONE, np.int64)
    asked = np.full((len(rows), questions), NONE, np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)], labels[i, : len(row.labels)], asked[i, : len(row.asked)] = (
            row.ids,
            row.labels,
            row.asked,
        )
    out = {name: torch.from_numpy(np.ascontiguousarray(labels[..., i])) for i, name in enumerate(FIELDS_OF_LABEL)}
    return out | {"ids": torch.from_numpy(ids), "asked": torch.from_numpy(asked)}


class Stream(IterableDataset):
    """Endless batches of a stage. A worker keeps a pool of rows; each is used `again` times on average."""

    def __init__(self, specs: list[RowSpec], vocab: int, seed: str, again: int = 4, split: str = "train") -> None:
        self.specs, self.vocab, self.seed, self.again, self.split = specs, vocab, seed, again, split

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        key = f"{self.seed}-{worker.id if worker else 0}"
        rng, numbers = Random(key), np.random.default_rng(list(key.encode()))
        relabel = Relabel(self.vocab, self.split)
        sources = [self._fresh(rng, s) for s in self.specs]
        pools: list[list[Row]] = [[] for _ in self.specs]
        while True:
            i = rng.choices(range(len(self.specs)), [s.weight for s in self.specs])[0]
            spec, pool = self.specs[i], pools[i]
            rows = []
            for _ in range(spec.batch):
                if len(pool) < 2 * spec.batch or rng.random() * self.again < 1:
                    fresh = next(sources[i])
                    if len(pool) < 8 * spec.batch:
                        pool.append(fresh)
                    else:
                        pool[int(rng.random() * len(pool))] = fresh
                rows.append(relabel(pool[int(rng.random() * len(pool))], numbers))
            yield collate(rows, spec.length)

    def _fresh(self, rng: Random, spec: RowSpec) -> Iterator[Row]:
        while True:
            yield from prompt_rows(rng, spec, self.split)
