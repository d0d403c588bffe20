"""Cost of scoring chunks in the turn that retains them: `python -m harness.experiments.serving.retaining --out FILE`.

Turns whose chunks are all new, under `cacheslide_first` (its chunks are copied out of the prompt's blocks) and under
`cacheslide_remember` (the same, then scored), with `encode` "now" and "later", in one engine, in
turns. Of each: TTFT, and the time until the engine is idle, including deferred scoring. A turn that does
not store its chunks, or not with its system's scores, stops the measurement.

The file holds every run, and for each way to encode the ratio of medians, scored over unscored, with its interval; and
how many rows scoring prefilled, beside the prompt's.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cacheslide.errors import CacheSlideError
from cacheslide.plain_values import json_object
from harness.experiments.serving.engine_ttft import Prompts
from harness.experiments.serving.engines import SHAPES, described, shaped
from harness.limit import Limit, add_minutes
from harness.metrics.bootstrap import ratio_of_medians
from harness.quiet import Reading, Watch
from harness.results.intervals import as_json, median
from harness.results.provenance import provenance
from harness.results.records import write_json
from harness.results.undisturbed import pick, too_few
from harness.step import command

UNSCORED, SCORED = "cacheslide_first", "cacheslide_remember"
ENCODES = ("now", "later")
TIMES = ("ttft_ms", "idle_ms")
Runs = dict[str, list[dict[str, float]]]


class Turns:
    """Retaining turns in one engine of this process.

    Parameters
    ----------
    engine : vllm.LLM
    tokens, vocabulary : int
        Of each prompt; ids are drawn below `vocabulary`.
    """

    def __init__(self, engine: Any, tokens: int, vocabulary: int) -> None:
        from cacheslide.vllm.offline import worker_of

        self.engine, self.tokens, self.vocabulary = engine, tokens, vocabulary
        self.core, self.worker = engine.llm_engine.engine_core.engine_core, worker_of()
        self.seed, self.scored = 0, 0
        encode = self.worker.encode

        def counted(step: Any) -> None:
            self.scored += sum(job.tokens for job in step.scores)
            encode(step)

        self.worker.encode = counted

    def run(self, system: str, encode: str) -> dict[str, float]:
        """One turn with new chunks: `TIMES` in milliseconds, and rows that scoring prefilled."""
        from cacheslide.vllm.offline import ask

        self.seed += 1
        ids, spans = Prompts(self.tokens, self.vocabulary, self.seed).turn()
        self._forget()
        annotations = {"segments": spans, "policy": system, "encode": encode}
        started = time.perf_counter()
        [answer] = ask(self.engine, [ids], [{"cacheslide": annotations}])
        self._idle()
        idle = time.perf_counter() - started
        self._check(system, answer.receipt)
        return {"ttft_ms": 1e3 * answer.ttft, "idle_ms": 1e3 * idle, "scored_rows": self.scored}

    def _forget(self) -> None:
        """Clear the chunk store, the pending work and the prefix cache."""
        from cacheslide.vllm.offline import ask

        if not self.engine.reset_prefix_cache(reset_connector=True):
            raise CacheSlideError("the engine's blocks are still in use")
        ask(self.engine, [[10, 11, 12]])  # workers clear theirs in the next step, which must not be timed
        self._idle()
        self.scored = 0

    def _idle(self) -> None:
        """Step until all retaining and scoring is complete, on the device too."""
        import torch

        while self.core.scheduler.has_requests():
            self.core.step_fn()
        if self.worker.model.device.type == "cuda":
            torch.cuda.synchronize(self.worker.model.device)

    def _check(self, system: str, receipt: Mapping[str, Any]) -> None:
        held = [self.worker.store.get(key) for key in list(self.worker.store._chunks)]
        scores = [chunk.scores is not None for chunk in held]
        right = all(scores) if system == SCORED else not any(scores)
        if receipt["chunks_hit"] or len(held) != receipt["chunks"] or not right:
            said = f"{sum(scores)} of {len(held)} chunks with scores, {receipt['chunks']} to retain"
            raise CacheSlideError(f"{system}: {said}, {receipt['chunks_hit']} reused")


def arm(system: str, encode: str) -> str:
    """Name in records of a system's turns under one `encode`."""
    return f"{system} {encode}"


def table(runs: Runs, quiet: Sequence[Reading], tokens: int) -> dict[str, Any]:
    """Medians, and by `encode` the ratios and the rows that scoring prefilled, over those of the prompt."""
    few, out = too_few(quiet), {}
    for encode in ENCODES:
        scored, plain = (pick(runs[arm(s, encode)], quiet) for s in (SCORED, UNSCORED))
        row: dict[str, Any] = {"disturbed": few}
        for name in TIMES:
            pair = [[run[name] for run in of] for of in (scored, plain)]
            row[name] = {s: median(x) for s, x in zip((SCORED, UNSCORED), pair, strict=True)}
            row[name]["ratio"] = None if few else as_json(ratio_of_medians(*pair))
        row["scored_rows_of_prompt"] = max(run["scored_rows"] for run in scored) / tokens
        out[encode] = row
    return out


def measure(turns: Turns, args: argparse.Namespace, made: Mapping[str, Any]) -> dict[str, Any]:
    """Measure all turns; the file is written after each."""
    limit, watch = Limit(args.minutes), None
    arms = [(system, encode) for encode in ENCODES for system in (UNSCORED, SCORED)]
    runs: Runs = {arm(*a): [] for a in arms}
    quiet: list[Reading] = []
    out: dict[str, Any] = dict(made)
    for number in range(-args.warmups, args.repeats):
        if limit.over:
            break
        if not number:
            watch = Watch()
        for shift in range(len(arms)):  # the first may meet a cooler device, so the order rotates
            system, encode = arms[(number + shift) % len(arms)]
            run = turns.run(system, encode)
            if number >= 0:
                runs[arm(system, encode)].append(run)
        if watch is not None:
            quiet.append(watch.lap())
            out |= {"table": table(runs, quiet, args.tokens), "runs": runs, "quiet": quiet}
            write_json(args.out, out | {"complete": number == args.repeats - 1})
    return out


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--shape", choices=SHAPES, default="mistral-7b", help="random weights of this shape")
    p.add_argument("--model", type=Path, help="a checkpoint in place of a shape")
    p.add_argument("--tokens", type=int, default=8192)
    p.add_argument("--repeats", type=int, default=12)
    p.add_argument("--warmups", type=int, default=2, help="rounds in which kernels are compiled; not timed")
    p.add_argument("--vocabulary", type=int, default=31000)
    p.add_argument("--store", choices=("model", "cpu"), default="model", help="where chunks are retained")
    p.add_argument("--memory", type=float, default=0.4, help="share of the device for vLLM")
    p.add_argument("--engine", type=json_object, default={}, help="more options of vllm.LLM, as JSON")
    p.add_argument("--commit", help="git commit of these sources, where the folder is a copy of a checkout")
    add_minutes(p)
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write one JSON file."""
    args = parser().parse_args(argv)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the turns inspect the worker
    from cacheslide.vllm.offline import close_engine, open_engine

    room = args.tokens + 64
    options = {"max_model_len": room, "max_num_batched_tokens": max(16384, room), "max_num_seqs": 16}
    options |= {"skip_tokenizer_init": True, "gpu_memory_utilization": args.memory}
    options |= {"load_format": "auto" if args.model else "dummy"} | args.engine
    connector = {"store_gib": 8, "store_device": args.store, "chunk_size": args.tokens}
    model = args.model or shaped(args.shape, Path(tempfile.mkdtemp()) / args.shape)
    engine = open_engine(str(model), connector, **options)
    try:
        settings = {k: str(v) for k, v in vars(args).items() if k not in ("out", "minutes", "commit")}
        made = provenance(settings, {}, str(args.model or f"{args.shape}, random weights"))
        if args.commit:
            made |= {"git_commit": args.commit, "git_dirty": None}
        turns = Turns(engine, args.tokens, args.vocabulary)
        out = measure(turns, args, {"provenance": made, "engine": described(engine)})
        print(json.dumps(out.get("table"), indent=1))
    finally:
        close_engine(engine)


if __name__ == "__main__":
    command(main)
