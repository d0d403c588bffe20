"""Training rows: a rendered prompt with several answered questions, as token ids with labels.

Labels are at the last piece of a statement (the value of its name), at the last token of a question (the answer's
first word) and on the answer's words. Rows are made on the fly by worker processes, each with its own seed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from harness.tasks.synthetic import render
from harness.tasks.synthetic.world import MIXES, Mix, build_world, draw_questions, draw_root_values

SETTLED, LINK, QUESTION, SECOND_WORD, END, OUTPUT = range(6)
IGNORE = -100
FIELDS = ("pos", "y1", "y2", "hops", "kind", "depth", "volatile", "ptr2", "ptr4")


@dataclass(frozen=True)
class RowSpec:
    """Shape of a curriculum stage's rows. Ranges are inclusive; `chunk_tokens` None means no filler."""

    chunks: tuple[int, int]
    statements: tuple[int, int]
    chunk_tokens: tuple[int, int] | None
    notes_filler: int
    depth: int
    questions: int
    length: int
    batch: int
    hint: float = 0.0
    deep: float = 0.7


@dataclass(frozen=True)
class Row:
    """Ids, (position, hinted) of every gathering place, and labels with `FIELDS` as columns."""

    ids: list[int]
    scratch: list[int]
    hinted: list[bool]
    labels: list[tuple[int, ...]]
    questions: int


def make_row(
    rng: Random,
    spec: RowSpec,
    table: dict[str, int],
    special: tuple[int, int],
    split: str = "train",
    style: str | None = None,
    mix: Mix | None = None,
) -> Row:
    """Draw a prompt and render it. Questions beyond `spec.length` are left out."""
    bos, eos = special
    style = style or render.STYLES[rng.random() < 0.5]
    mix = mix or MIXES["deep" if rng.random() < spec.deep else "sparse"]
    sizes = [_between(rng, spec.statements) for _ in range(_between(rng, spec.chunks))]
    world = build_world(rng, mix, split, sizes, max_depth=spec.depth)
    roots = draw_root_values(rng, split, world.roots)
    notes = render.notes_document(rng, style, world, roots, spec.notes_filler)
    documents = [notes, *render.fixed_documents(rng, style, world, spec.chunk_tokens)]
    ids, scratch, labels = [bos, *(table[p] for p in render.SYSTEM[style])], [], []
    for document in documents:
        ids.extend(table[p] for p in document.head)
        for sentence in document.sentences:
            ids.extend([table[p] for p in sentence.pieces])
            if sentence.node is not None:
                scratch.append(len(ids) - 1)
                labels.append(_label(world, roots, table, sentence.node, len(ids) - 1, asked=False))
    for node in draw_questions(rng, world, spec.questions):
        text = [table[p] for p in render.question(style, world.nodes[node].name)]
        words = [table[p] for p in render.answer(world.resolve(node, roots))]
        if len(ids) + len(text) + 2 > spec.length:
            break
        ids.extend(text)
        scratch.append(len(ids) - 1)
        labels.append(_label(world, roots, table, node, len(ids) - 1, asked=True))
        rest = labels[-1][5:7]
        labels.append((len(ids), words[1], IGNORE, 99, SECOND_WORD, *rest, IGNORE, IGNORE))
        labels.append((len(ids) + 1, eos, IGNORE, 99, END, *rest, IGNORE, IGNORE))
        ids.extend(words)
    if len(ids) > spec.length:
        raise ValueError(f"a row of {len(ids)} tokens does not fit into {spec.length}")
    rate = spec.hint if rng.random() < 0.5 else float(rng.random() < spec.hint)
    hinted = [rng.random() < rate for _ in scratch]
    return Row(ids, scratch, hinted, labels, sum(x[4] == QUESTION for x in labels))


def _between(rng: Random, bounds: tuple[int, int]) -> int:
    return bounds[0] + int(rng.random() * (bounds[1] - bounds[0] + 1))


def _label(world, roots, table, index, position, asked) -> tuple[int, ...]:
    node, chain = world.nodes[index], world.chain(index)
    first, second = (table[p] for p in render.answer(world.resolve(index, roots)))
    hops = len(chain) - 1
    ptr2, ptr4 = (table[f" {world.nodes[chain[k]].name[1]}"] if not asked and hops >= k else IGNORE for k in (2, 4))
    kind = QUESTION if asked else LINK if hops else SETTLED
    return (position, first, second, hops, kind, node.depth, int(node.root is not None), ptr2, ptr4)


def collate(rows: list[Row], length: int, pad: int) -> dict[str, torch.Tensor]:
    """Rows padded to `length`. Positions become indices into the flattened (batch, length) grid."""
    ids = np.full((len(rows), length), pad, np.int64)
    scratch, asked, hinted, labels, bare = [], [], [], [], []
    for b, row in enumerate(rows):
        ids[b, : len(row.ids)] = row.ids
        scratch.append(np.asarray(row.scratch, np.int64) + b * length)
        asked.append(np.arange(len(row.scratch)) >= len(row.scratch) - row.questions)
        hinted.append(np.asarray(row.hinted, np.float32))
        table = np.asarray(row.labels, np.int64)
        table[:, 0] += b * length
        labels.append(table)
        bare.append(np.full(len(table), not any(row.hinted)))
    table = np.concatenate(labels)
    batch = {name: torch.from_numpy(np.ascontiguousarray(table[:, i])) for i, name in enumerate(FIELDS)}
    batch["bare"] = torch.from_numpy(np.concatenate(bare))
    batch["resolved"] = torch.from_numpy(np.flatnonzero(table[:, FIELDS.index("kind")] <= QUESTION))
    batch["ids"] = torch.from_numpy(ids)
    batch["scratch"] = torch.from_numpy(np.concatenate(scratch))
    batch["asked"] = torch.from_numpy(np.concatenate(asked))
    batch["hinted"] = torch.from_numpy(np.concatenate(hinted))
    return batch


class Stream(IterableDataset):
    """Endless batches of a stage; several specs alternate in the given proportions."""

    def __init__(self, specs: list[tuple[float, RowSpec]], table: dict[str, int], special: dict[str, int], seed: str):
        self.specs, self.table, self.special, self.seed = specs, table, special, seed

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        rng = Random(f"{self.seed}-{worker.id if worker else 0}")
        ends, total = (self.special["bos"], self.special["eos"]), sum(w for w, _ in self.specs)
        while True:
            spec = self._pick(rng.random() * total)
            rows = [make_row(rng, spec, self.table, ends) for _ in range(spec.batch)]
            yield collate(rows, spec.length, self.special["pad"])

    def _pick(self, at: float) -> RowSpec:
        for weight, spec in self.specs[:-1]:
            at -= weight
            if at < 0:
                return spec
        return self.specs[-1][1]


def loader(stream: Stream, workers: int) -> DataLoader:
    """A loader of whole batches; seeded, and the same order for the same number of workers."""
    extra = {"prefetch_factor": 4, "multiprocessing_context": "fork"} if workers else {}
    return DataLoader(stream, batch_size=None, num_workers=workers, pin_memory=torch.cuda.is_available(), **extra)
