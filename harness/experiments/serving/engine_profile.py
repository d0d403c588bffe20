"""Where a request's time goes inside vLLM: `python -m harness.experiments.serving.engine_profile --out FILE`.

Requests of one length, plain and annotated, in a process with the engine inside: when each of their parts ran on the
host and on the device (`timeline.py`), then one more with PyTorch's profiler, kernels by device time and operators by
host time.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness.experiments.serving.arms import add_arguments, arms
from harness.experiments.serving.engine_ttft import Prompts, fill, once
from harness.experiments.serving.engines import SHAPES, shaped
from harness.experiments.serving.timeline import Timeline, medians
from harness.quiet import Watch
from harness.step import command


def profiled(run) -> dict:
    """Kernels and host operators of `run`, each summed over the run, in microseconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        run()
    rows = prof.key_averages()
    device = sorted(rows, key=lambda r: -r.self_device_time_total)[:30]
    host = sorted(rows, key=lambda r: -r.self_cpu_time_total)[:30]
    return {
        "device_us": sum(r.self_device_time_total for r in rows),
        "kernels": [[r.key[:120], r.count, r.self_device_time_total] for r in device if r.self_device_time_total],
        "host": [[r.key[:80], r.count, r.self_cpu_time_total] for r in host],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Profile and write one JSON file."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    p.add_argument("--tokens", type=int, default=8192)
    add_arguments(p, [0.26])
    p.add_argument("--store", choices=["model", "cpu"], default="model")
    p.add_argument("--eager", action="store_true")
    p.add_argument("--repeats", type=int, default=8)
    args = p.parse_args(argv)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch

    from cacheslide.vllm.offline import close_engine, open_engine

    engine = open_engine(
        str(shaped(args.shape, Path(tempfile.mkdtemp()))),
        {"store_device": args.store, "store_gib": 8},
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=args.tokens + 64,
        gpu_memory_utilization=0.4,
        enforce_eager=args.eager,
        max_num_batched_tokens=16384,
    )
    prompts = Prompts(args.tokens, 31000)
    fill(engine, prompts, args.systems)
    found = {}
    for system in ("recompute", *arms(args)):
        for _ in range(3):
            once(engine, prompts, system, 1)
        ttft, requests, watch, timeline = [], [], Watch(), Timeline()
        for _ in range(args.repeats):
            with timeline.measuring():
                ttft.append(1e3 * once(engine, prompts, system, 1)["ttft"][0])
            requests.append(timeline.calls)
        found[system] = {"ttft_ms": ttft, "timeline": medians(requests), "quiet": watch.lap()}
        found[system] |= profiled(lambda system=system: (once(engine, prompts, system, 1), torch.cuda.synchronize()))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        print(system, ttft, "device", found[system]["device_us"] / 1e3, flush=True)
        for line in found[system]["timeline"]:
            print("  ", line, flush=True)
        for name, count, us in found[system]["kernels"][:18]:
            print(f"  {us / 1e3:8.2f} ms {count:5d}  {name}", flush=True)
    close_engine(engine)


if __name__ == "__main__":
    command(main)
