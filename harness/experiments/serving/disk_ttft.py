"""TTFT with chunks on disk: `python -m harness.experiments.serving.disk_ttft --out FILE.json`.

One engine over a file tier, prompts as in `engine_ttft`. Timed in turns at every length:

recompute         without annotations
memory            chunks in the engine's memory
file              chunks in files only: looked up, read, checked and laid into memory while the request waits
memory beside file  a request whose chunks are in memory, sent together with one whose chunks are in files

A request whose receipt names another tier than its row stops the run. Files may be in the page cache unless
--direct; the record says which.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from cacheslide.plain_values import json_object
from harness.experiments.serving.engine_ttft import Prompts, fill
from harness.experiments.serving.engines import described, shaped
from harness.limit import Limit, add_minutes
from harness.metrics.bootstrap import median
from harness.quiet import Reading, Watch
from harness.results.provenance import machine
from harness.results.records import write_json
from harness.results.undisturbed import pick, too_few
from harness.step import command

SYSTEM, SHARE = "cacheslide", 0.26
ROWS = ("recompute", "memory", "file", "memory beside file")


class Measured:
    """An engine in this process with two sets of prompts and the chunks of each."""

    def __init__(self, engine, tokens: int, vocabulary: int) -> None:
        from cacheslide.vllm.offline import worker_of

        self.engine, self.worker = engine, worker_of()
        self.scheduler = engine.llm_engine.engine_core.engine_core.scheduler.connector.scheduler
        self.in_memory, self.on_disk = (Prompts(tokens, vocabulary, seed=tokens + i) for i in range(2))
        fill(engine, self.in_memory)
        known = set(self.scheduler.index.keys())
        fill(engine, self.on_disk)
        self.chunks = set(self.scheduler.index.keys()) - known
        self.worker.storage_tier.flush()

    def forget(self) -> None:
        """Drop the chunks of prompts on disk from memory; their files stay."""
        for key in self.chunks:
            self.scheduler.index.discard(key)
        self.worker.store.drop(self.chunks)

    def time(self, row: str) -> list[float]:
        """TTFT in seconds of a row's request and of its neighbour."""
        from cacheslide.vllm.offline import ask

        if row == "recompute":
            return [ask(self.engine, [self.in_memory.turn()[0]])[0].ttft]
        if "file" in row:
            self.forget()
        asked = {"memory": [self.in_memory], "file": [self.on_disk]}.get(row, [self.in_memory, self.on_disk])
        turns = [prompts.turn() for prompts in asked]
        annotations = [
            {"cacheslide": {"segments": spans, "policy": SYSTEM, "recompute_ratio": SHARE, "encode": "off"}}
            for _, spans in turns
        ]
        answers = ask(self.engine, [ids for ids, _ in turns], annotations)
        for prompts, answer in zip(asked, answers, strict=True):
            tiers = set(answer.receipt["tiers"])
            wanted = {"file"} if prompts is self.on_disk else {"host", "device"} & tiers
            if tiers != wanted or answer.receipt["chunks_hit"] != answer.receipt["chunks"]:
                raise RuntimeError(f"not what {row!r} says: {answer.receipt}")
        return [a.ttft for a in answers]


def measure(args: argparse.Namespace, limit: Limit, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All lengths on one engine; the record is written after every turn."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # to inspect the scheduler and the worker
    from cacheslide.vllm.offline import close_engine, open_engine

    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        model = args.model or str(shaped(args.shape, Path(folder) / args.shape))
        store = {"path": f"{folder}/store", "host_gib": args.memory_gib, "file_gib": args.file_gib}
        store |= {"direct": args.direct, "queue_mib": 4096, "load_workers": args.load_workers}
        options = {
            "max_model_len": max(args.lengths) + 64,
            "skip_tokenizer_init": True,
            "max_num_batched_tokens": 16384,
            "max_num_seqs": 16,  # graphs of larger batches would only take time to capture
        }
        options |= ({} if args.model else {"load_format": "dummy"}) | args.engine
        engine = open_engine(model, {"chunk_size": max(args.lengths)}, store=store, **options)
        settings = {
            "system": SYSTEM,
            "recompute_ratio": SHARE,
            "direct": args.direct,
            "load_workers": args.load_workers,
        }
        record = {"model": args.model or args.shape, "settings": settings, "complete": False, "machine": machine()}
        record |= {"engine": described(engine), "rows": []}
        try:
            for tokens in args.lengths:
                before = record["rows"]
                for rows in _length(engine, tokens, args, limit):
                    record["rows"] = before + rows
                    write(record)
            done = [len(row["runs"]) for row in record["rows"]]
            record["complete"] = done == [args.repeats] * len(ROWS) * len(args.lengths)
            write(record)
        finally:
            close_engine(engine)
    return record


def _length(engine, tokens: int, args: argparse.Namespace, limit: Limit) -> Iterator[list[dict[str, Any]]]:
    """A length's rows after every turn, until the time limit."""
    if limit.over:
        return
    measured = Measured(engine, tokens, args.vocabulary)
    runs: dict[str, list[list[float]]] = {row: [] for row in ROWS}
    quiet: list[Reading] = []
    watch = None
    for turn in range(args.repeats + 1):  # the first is a warm-up
        if limit.over:
            return
        for row in ROWS[turn % len(ROWS) :] + ROWS[: turn % len(ROWS)]:
            seconds = measured.time(row)
            if turn:
                runs[row].append(seconds)
        if watch is None:
            watch = Watch()
        else:
            quiet.append(watch.lap())
            yield [_row(tokens, row, found, quiet) for row, found in runs.items()]


def _row(tokens: int, chunks: str, runs: list[list[float]], quiet: list[Reading]) -> dict[str, Any]:
    """A row over the turns so far: medians of the undisturbed ones, or of all if those are too few."""
    seconds = median([r[0] for r in pick(runs, quiet)])
    row = {"tokens": tokens, "chunks": chunks, "ttft_s": asdict(seconds), "runs": list(runs), "quiet": list(quiet)}
    return row | {"disturbed": too_few(quiet)}


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--work", default=None, help="folder on the disk to be measured")
    p.add_argument("--shape", default="mistral-7b", help="dummy weights of this shape")
    p.add_argument("--model", help="a checkpoint instead of a shape")
    p.add_argument("--vocabulary", type=int, default=31000)
    p.add_argument("--lengths", type=lambda x: [int(n) for n in x.split(",")], default=[4096, 8192])
    p.add_argument("--repeats", type=int, default=12)
    p.add_argument("--memory-gib", type=float, default=8.0)
    p.add_argument("--file-gib", type=float, default=32.0)
    p.add_argument("--load-workers", type=int, default=8)
    p.add_argument("--direct", action="store_true", help="read past the page cache")
    p.add_argument("--engine", type=json_object, default={}, help="more options of the engine, as JSON")
    add_minutes(p)
    args = p.parse_args()
    record = measure(args, Limit(args.minutes), partial(write_json, args.out))
    for row in record["rows"]:
        print(row["tokens"], row["chunks"], row["ttft_s"], row["disturbed"], flush=True)


if __name__ == "__main__":
    command(main)
