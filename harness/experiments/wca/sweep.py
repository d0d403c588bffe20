"""Sweep of WCA's open points: `python -m harness.experiments.wca.sweep --model DIR [--adapter DIR] --out DIR`.

Every cell of `wca_cells` answers the same questions, on the native (RoPE) model and, with `--adapter`, on its CoPE
model. Records go to `OUT/rope.jsonl` and `OUT/cope.jsonl`, one line a cell and prompt; existing ones are not
measured again, so that a run can be stopped, resumed, or extended by more prompts. `OUT/summary.json` has the tables.
Prompts are of the validation split: defaults may follow from them, and the study's test prompts stay unseen.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import zip_longest
from multiprocessing import get_context
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from tqdm import tqdm

from cacheslide.core.engine import ReuseEngine
from cacheslide.core.receipt import Receipt
from cacheslide.models.weights import fingerprint
from cacheslide.store.memory import MemoryChunkStore
from harness.backends.cope import CopeBackend
from harness.backends.reference import EngineSettings, ReferenceBackend, exact_arithmetic
from harness.experiments.wca.cells import Cell, cells
from harness.results.provenance import provenance
from harness.results.records import reopened, write_json
from harness.results.rounding import rounded
from harness.results.runs import read_json
from harness.results.wca import DIGITS, read_sweep, tabulate
from harness.scoring import question_records
from harness.step import command
from harness.tasks.example import TaskExample
from harness.tasks.synthetic.prompts import examples
from harness.tasks.synthetic.render import STYLES

NEW_TOKENS = 4
SPLIT = "validation"


@dataclass(frozen=True)
class Job:
    """Input of a worker process; `cells` gives the settings that a model of so many layers is measured under."""

    model: str
    adapter: str | None
    live: bool
    device: str
    threads: int
    cells: Callable[[int], list[Cell]] = cells


def open_backend(job: Job) -> ReferenceBackend:
    """The native model, or the CoPE model of `job.adapter`, with its calibration unless `live`."""
    torch.set_num_threads(job.threads)
    exact_arithmetic()
    if job.adapter is None:
        return ReferenceBackend(job.model, device=job.device)
    return CopeBackend(job.model, job.adapter, device=job.device, live=job.live)


def measure(backend: ReferenceBackend, example: TaskExample, todo: Sequence[Cell]) -> Iterator[dict[str, Any]]:
    """One record a cell, from chunk caches of the previous turn, separate by prompt and kind of cache."""
    caches = Caches(backend, example, todo)
    for cell in todo:
        yield measure_cell(caches, cell)


class Caches:
    """Chunk caches of one prompt's previous turn, shared by the cells `todo` that can share them."""

    def __init__(self, backend: ReferenceBackend, example: TaskExample, todo: Sequence[Cell]) -> None:
        self.backend, self.example = backend, example
        self._captured = frozenset().union(*(c.capture for c in todo))
        self._before = backend.prompt(example.previous)
        self._stores: dict[tuple[bool, bool], MemoryChunkStore] = defaultdict(MemoryChunkStore)

    def engine(self, cell: Cell) -> ReuseEngine:
        """An engine for the cell, over filled caches."""
        inputs, remembers = bool(cell.capture), cell.policy.needs_scores
        store = self._stores[inputs, remembers]  # chunks with layer inputs, and with scores, have stores of their own
        captured = self._captured if inputs else frozenset()
        engine = self.backend.engine(cell.policy, store, EngineSettings(), captured)
        engine.build(self._before)
        return engine


def measure_cell(caches: Caches, cell: Cell) -> dict[str, Any]:
    """The record of one cell on the prompt of `caches`."""
    backend, example = caches.backend, caches.example
    answers, receipts = answered(backend, caches.engine(cell), example, cell.asks)
    found, columns = question_records(example, answers), ("f1", "depth", "volatile")
    receipt = receipts[0]
    return {
        "id": record_id(cell.name, example),
        "cell": cell.name,
        "example": prompt_id(example),
        "mix": example.meta["mix"],
        "device": backend.model.device,
        "compute_fraction": sum(r.compute_fraction for r in receipts) / len(receipts),
        "tokens_reused": receipt.tokens_reused,
        "tokens_recomputed": receipt.tokens_recomputed,
        "alpha": sum(receipt.alpha.values()) / len(receipt.alpha) if receipt.alpha else None,
        **{c: [q[c] for q in found] for c in columns},
    }


def answered(
    backend: ReferenceBackend, engine: ReuseEngine, example: TaskExample, asks: bool
) -> tuple[list[str], list[Receipt]]:
    """The answers to all questions and the receipts of the prefills: one behind which all are asked, or one each."""
    if not asks:
        shortest, room = min(map(len, backend.questions(example))), backend.room(example, NEW_TOKENS)
        state = engine.prefill(backend.prompt(example.segments), following=shortest, room=room)
        return backend.answers(state, example, NEW_TOKENS), [state.receipt]
    answers, states = backend.answers_each(engine, example, NEW_TOKENS)
    return answers, [state.receipt for state in states]


def prompt_id(example: TaskExample) -> str:
    """An id that, unlike `example.id`, differs between styles and mixes."""
    return f"{example.meta['style']} {example.meta['mix']} {example.id}"


def record_id(cell: str, example: TaskExample) -> str:
    """One cell's answers on one prompt."""
    return f"{cell} @ {prompt_id(example)}"


_worker: dict[str, Any] = {}


def _load(job: Job) -> None:
    _worker["backend"] = open_backend(job)
    _worker["cells"] = job.cells(_worker["backend"].num_layers)


def _run(example: TaskExample, names: list[str]) -> list[dict[str, Any]]:
    backend = _worker["backend"]
    return list(measure(backend, example, [c for c in _worker["cells"] if c.name in names]))


def prompts_of(mixes: Sequence[str], count: int, tokens: int, seed: int) -> list[TaskExample]:
    """`count` prompts of every style and mix, interleaved, so that a run that ends early covers all kinds."""
    kinds = [list(examples(style, mix, SPLIT, seed, count, tokens)) for style in STYLES for mix in mixes]
    return [x for group in zip_longest(*kinds) for x in group if x is not None]


def sweep(job: Job, output: Path, settings: dict[str, Any], given: Sequence[TaskExample], jobs: int, until: float):
    """Measure what `output` lacks, in `jobs` processes (0: in this one), until the time `until`."""
    writer, names = reopened(output, settings), [c.name for c in job.cells(ReferenceBackend(job.model).num_layers)]
    missing = [(x, [n for n in names if record_id(n, x) not in writer.done]) for x in given]
    missing = [(x, left) for x, left in missing if left]
    try:
        for records in tqdm(_results(job, missing, jobs, until), total=len(missing), desc=output.stem, mininterval=5):
            for record in records:
                writer.add(record)
    finally:
        writer.finish()


def _results(job: Job, missing: Sequence[tuple], jobs: int, until: float) -> Iterator[list[dict[str, Any]]]:
    if not missing:
        return
    if not jobs:
        _load(job)
        for task in missing:
            yield _run(*task)
            if monotonic() > until:
                return
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), _load, (job,)) as pool:
        tasks = [pool.submit(_run, *task) for task in missing]
        for task in as_completed(tasks):
            if not task.cancelled():
                yield task.result()
            if monotonic() > until:
                for t in tasks:
                    t.cancel()


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, help="a CoPE adapter of the model; without it only RoPE is swept")
    parser.add_argument("--live", action="store_true", help="leave the adapter's calibration aside (CoPE, not CCPE)")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--prompts", type=int, default=24, help="prompts of every style and mix")
    parser.add_argument("--mixes", nargs="+", default=["deep"], choices=["deep", "sparse"])
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--seed", type=int, default=1, help="of the prompts; the selection layer was chosen on seed 0")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side; 0: none but this one")
    parser.add_argument("--minutes", type=float, default=60.0, help="each model stops measuring after its half")
    parser.add_argument("--summarize-only", action="store_true", help="tables anew, from the records in OUT")
    args = parser.parse_args(argv)
    given = prompts_of(args.mixes, args.prompts, args.tokens, args.seed)
    about = {"split": SPLIT, "tokens": args.tokens, "seed": args.seed, "model": fingerprint(args.model)}
    kinds: dict[str, tuple[Path | None, dict[str, Any]]] = {"rope": (None, about)}
    if args.adapter:
        made = CopeBackend(args.model, args.adapter, live=args.live).model.model_id
        kinds["cope"] = args.adapter, about | {"model": made}
    started = monotonic()
    for i, (kind, (adapter, settings)) in enumerate(kinds.items(), 1):
        job = Job(str(args.model), adapter and str(adapter), args.live, args.device, 1)
        until = started + 60 * args.minutes * i / len(kinds)
        if not args.summarize_only:
            sweep(job, args.out / f"{kind}.jsonl", settings, given, args.jobs, until)
    layers = ReferenceBackend(args.model).num_layers
    files = {k: args.out / f"{k}.jsonl" for k in ("rope", "cope") if (args.out / f"{k}.jsonl").is_file()}
    done = {kind: read_sweep(path) for kind, path in files.items()}
    ids = " ".join(settings["model"] for settings, _ in done.values())
    summary = args.out / "summary.json"
    if args.summarize_only and summary.is_file():
        origin = read_json(summary)["provenance"]  # of the measurement, not of the tabulation
    else:
        origin = provenance({"mixes": args.mixes} | about, {}, ids)
    write_json(summary, rounded(tabulate(done, cells(layers)) | {"provenance": origin}, DIGITS))


if __name__ == "__main__":
    command(main)
