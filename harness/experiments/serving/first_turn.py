"""TTFT of turns that retain their chunks: `python -m harness.experiments.serving.first_turn --out FILE`.

TTFT of prompts whose chunks are copied out of their own blocks (system `naive_reuse`, whose encoding is the prompt's),
on the model's device and in host memory, beside the same request with nothing retained and a plain one. A plain request
follows each of them, since it waits for copies still in flight. The conditions take turns.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from harness.experiments.serving.engine_ttft import Prompts
from harness.experiments.serving.engines import SHAPES, shaped
from harness.limit import Limit, add_minutes
from harness.quiet import Watch
from harness.results.provenance import provenance
from harness.results.records import write_json
from harness.results.undisturbed import pick, too_few
from harness.step import command

CONDITIONS = ("plain", "nothing_retained", "retained_on_model", "retained_on_cpu")


def turn(engine, prompts: Prompts, condition: str, number: int) -> dict[str, float]:
    """TTFT in milliseconds of one request, and of the plain one after it."""
    from cacheslide.vllm.offline import ask

    ids, spans = prompts.turn()
    annotations = {"segments": spans, "policy": "naive_reuse", "namespace": f"{condition}-{number}"}
    annotations["encode"] = "off" if condition == "nothing_retained" else "now"
    [first] = ask(engine, [ids], [None if condition == "plain" else {"cacheslide": annotations}])
    if condition != "plain" and not first.receipt["fallback"]:
        raise RuntimeError(f"a first turn was not computed exactly: {first.receipt}")
    [behind] = ask(engine, [prompts.turn()[0]])
    return {"ttft_ms": 1e3 * first.ttft, "behind_ms": 1e3 * behind.ttft}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write one JSON file."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    p.add_argument("--model", type=Path, help="a checkpoint in place of a shape with random weights")
    p.add_argument("--tokens", type=int, default=8192)
    p.add_argument("--repeats", type=int, default=10)
    p.add_argument("--vocabulary", type=int, default=31000)
    p.add_argument("--memory", type=float, default=0.4, help="share of the device for vLLM")
    add_minutes(p)
    args = p.parse_args(argv)
    limit = Limit(args.minutes)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from cacheslide.vllm.offline import close_engine, open_engine, worker_of

    engine = open_engine(
        str(args.model or shaped(args.shape, Path(tempfile.mkdtemp()))),
        {"store_gib": 16},
        load_format="auto" if args.model else "dummy",
        skip_tokenizer_init=True,
        max_model_len=args.tokens + 64,
        gpu_memory_utilization=args.memory,
        max_num_batched_tokens=max(16384, args.tokens + 64),
        max_num_seqs=16,  # graphs of larger batches would only take time to capture
    )
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("out", "minutes")}
    made = provenance(settings, {}, str(args.model or f"{args.shape}, random weights"))
    prompts = Prompts(args.tokens, args.vocabulary)
    found, cold = ({c: [] for c in CONDITIONS} for _ in range(2))
    medians, quiet = {}, []
    watch = None
    try:
        worker, save, spent = worker_of(), worker_of().save, []

        def timed(step) -> None:
            started = time.perf_counter()
            save(step)
            if step.saves:
                spent.append(1e3 * (time.perf_counter() - started))

        worker.save = timed
        for number in range(-2, args.repeats):  # two rounds in which kernels are compiled and host memory is pinned
            if limit.over:
                break
            if not number:
                watch = Watch()
            for condition in CONDITIONS:
                if condition.startswith("retained_on"):
                    worker.move_store(condition.removeprefix("retained_on_"))
                spent.clear()
                measured = turn(engine, prompts, condition, number) | {"save_host_ms": sum(spent)}
                if condition.startswith("retained_on") is not bool(spent):
                    raise RuntimeError(f"{condition}: {len(spent)} saves")
                (cold if number < 0 else found)[condition].append(measured)
                worker.store.clear()
                engine.llm_engine.engine_core.engine_core.scheduler.connector.scheduler.reset()
            if watch is not None:
                quiet.append(watch.lap())
            medians = {
                c: {k: statistics.median(r[k] for r in pick(rows, quiet)) for k in rows[0]}
                for c, rows in found.items()
                if rows
            }
            out = {"median": medians, "runs": found, "cold": cold, "provenance": made}
            out |= {"quiet": quiet, "disturbed": too_few(quiet)}
            write_json(args.out, out | {"complete": number == args.repeats - 1})
        print(json.dumps(medians, indent=1))
    finally:
        close_engine(engine)


if __name__ == "__main__":
    command(main)
