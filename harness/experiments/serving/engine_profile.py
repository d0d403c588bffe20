"""Where a request's time goes inside vLLM: `python -m harness.experiments.serving.engine_profile --out FILE`.

Plain and annotated requests of some lengths on an in-process engine: the times of each part on the host and on the
device (`timeline.py`), then one more request under PyTorch's profiler, with kernels by device time and operators by
host time.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness.comma_lists import ints
from harness.experiments.serving.arms import add_arguments, arms
from harness.experiments.serving.engine_ttft import Prompts, fill, once
from harness.experiments.serving.engines import SHAPES, shaped
from harness.experiments.serving.timeline import Timeline, medians
from harness.quiet import Watch
from harness.results.provenance import provenance
from harness.results.records import write_json
from harness.results.rounding import rounded
from harness.step import command


def profiled(run) -> dict:
    """Kernels and host operators of `run`, each summed over the run, in microseconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        run()
    rows = prof.key_averages()
    device = sorted(rows, key=lambda r: -r.self_device_time_total)[:16]
    host = sorted(rows, key=lambda r: -r.self_cpu_time_total)[:10]
    return {
        "device_us": sum(r.self_device_time_total for r in rows),
        "kernels": [[r.key[:120], r.count, r.self_device_time_total] for r in device if r.self_device_time_total],
        "host": [[r.key[:80], r.count, r.self_cpu_time_total] for r in host],
    }


def measured(engine, prompts: Prompts, system: str, repeats: int) -> dict:
    """TTFT and time line of `repeats` requests after three warm-ups, then one more under PyTorch's profiler."""
    import torch

    for _ in range(3):
        once(engine, prompts, system, 1)
    ttft, requests, watch, timeline = [], [], Watch(), Timeline()
    for _ in range(repeats):
        with timeline.measuring():
            ttft.append(1e3 * once(engine, prompts, system, 1)["ttft"][0])
        requests.append(timeline.calls)
    found = {"ttft_ms": ttft, "timeline": medians(requests), "quiet": watch.lap()}
    return found | profiled(lambda: (once(engine, prompts, system, 1), torch.cuda.synchronize()))


def show(name: str, found: dict) -> None:
    """Print a short summary."""
    print(name, found["ttft_ms"], "device", found["device_us"] / 1e3, flush=True)
    for line in found["timeline"]:
        print("  ", line, flush=True)
    for kernel, count, us in found["kernels"]:
        print(f"  {us / 1e3:8.2f} ms {count:5d}  {kernel}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Profile and write one JSON file."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    p.add_argument("--lengths", "--tokens", type=ints, default=[8192])
    add_arguments(p, [0.26])
    p.add_argument("--store", choices=["model", "cpu"], default="model")
    p.add_argument("--eager", action="store_true")
    p.add_argument("--repeats", type=int, default=8)
    args = p.parse_args(argv)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from cacheslide.vllm.offline import close_engine, open_engine

    engine = open_engine(
        str(shaped(args.shape, Path(tempfile.mkdtemp()))),
        {"store_device": args.store, "store_gib": 8, "chunk_size": max(args.lengths)},
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=max(args.lengths) + 64,
        gpu_memory_utilization=0.4,
        enforce_eager=args.eager,
        max_num_batched_tokens=16384,
    )
    made = {"provenance": provenance({k: str(v) for k, v in vars(args).items()}, {}, f"{args.shape}, random weights")}
    made["lengths"] = {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for tokens in args.lengths:
        prompts, found = Prompts(tokens, 31000), {}
        fill(engine, prompts, args.systems)
        for system in ("recompute", *arms(args)):
            found[system] = measured(engine, prompts, system, args.repeats)
            write_json(args.out, rounded(made | {"lengths": made["lengths"] | {str(tokens): found}}))
            show(f"{tokens} {system}", found[system])
        made["lengths"][str(tokens)] = found
    close_engine(engine)


if __name__ == "__main__":
    command(main)
