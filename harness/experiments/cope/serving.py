"""CoPE inside vLLM against the same model with rotation: `python -m harness.experiments.cope.serving --out FILE`.

Two engines of one shape with random weights run in turns: vanilla attention, and CoPE with random position tables and
the base's projections. Measured are the time to first token of a prompt computed in full and of one completed from
cached chunks (`--systems`, `--graphs`), and the time of a decoding step. With random weights gates are about 0.5, so
that rows saturate after about 2 * p_max keys: a CoPE model with smaller gates is slower (see `cope_kernels`).
"""

import argparse
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cacheslide.plain_values import json_object
from cacheslide.training.adapter import AdapterSettings, CopeAdapter, save_adapter
from cacheslide.training.calibration import Calibration, save_calibration
from harness.experiments.serving.arms import add_arguments, arms
from harness.experiments.serving.engine_ttft import Prompts, fill, once
from harness.experiments.serving.engines import SHAPES, described, shaped
from harness.limit import Limit, add_minutes
from harness.metrics.bootstrap import median, ratio_of_medians
from harness.quiet import Watch
from harness.results.provenance import provenance
from harness.results.records import write_json
from harness.results.undisturbed import pick, too_few
from harness.step import command


def random_tables(shape: str, folder: Path, p_max: int, offsets: bool) -> Path:
    """An adapter without LoRA and with random position tables for a shape; with `offsets` random Γ of one slot."""
    sizes = SHAPES[shape]
    layers, heads, dim = (sizes[k] for k in ("num_hidden_layers", "num_attention_heads", "head_dim"))
    g = torch.Generator().manual_seed(0)
    tables = {f"layers.{i}.positions": torch.randn(p_max, dim, generator=g) * 0.1 for i in range(layers)}
    adapter = CopeAdapter(AdapterSettings(p_max=p_max, projections=()), "random weights", tables)
    save_adapter(adapter, folder)
    if offsets:
        drawn = torch.rand(layers, 1, heads, generator=g) * 8
        save_calibration(Calibration(drawn, adapter.digest, "random", 0.5), folder)
    return folder


def decode_step(engine, prompts: list[list[int]], tokens: int) -> float:
    """Seconds of a step in which all prompts decode; their prefill is served by the prefix cache."""
    from cacheslide.vllm.offline import ask

    ask(engine, prompts)
    answers = ask(engine, prompts, tokens=tokens)
    if min(a.cached_tokens for a in answers) < 0.9 * len(prompts[0]):
        raise RuntimeError("the prefix cache did not hold the prompts that were to decode")
    return sum(a.step for a in answers) / len(answers)


def measure(engines: dict[str, Any], args: argparse.Namespace, result: dict[str, Any], write, limit: Limit) -> None:
    """Measure every length and batch, engines in turns; the result is written after every turn."""
    systems = ["recompute", *arms(args)]
    for length in args.lengths:
        drawn = Prompts(length, args.vocabulary, seed=length)
        for engine in engines.values():
            fill(engine, drawn, args.systems)
        cell: dict[str, dict[str, list]] = {f"{e} {s}": {"ttft": []} for e in engines for s in systems}
        result["ttft"][length] = cell
        quiet = result.setdefault("quiet", {}).setdefault(f"ttft {length}", [])
        watch = None
        for turn in range(args.warmups + args.repeats):
            if limit.over:
                return
            if turn == args.warmups:
                watch = Watch()
            for system in systems:
                for name in sorted(engines, reverse=bool(turn % 2)):
                    said = once(engines[name], drawn, system, 1, 2)
                    if turn >= args.warmups:
                        cell[f"{name} {system}"]["ttft"] += said.pop("ttft")
                        cell[f"{name} {system}"] |= {k: v for k, v in said.items() if k != "seconds"}  # of a run
            if watch is not None:
                quiet.append(watch.lap())
            write(result)
    for batch in args.batches:
        drawn = Prompts(args.decode_context, args.vocabulary, seed=batch)
        steps: dict[str, list[float]] = {e: [] for e in engines}
        prompts = [drawn.turn()[0] for _ in range(batch)]
        result["decode"][batch] = {"context": args.decode_context, "tokens": args.decode_tokens, "step": steps}
        quiet = result.setdefault("quiet", {}).setdefault(f"decode {batch}", [])
        watch = None
        for turn in range(args.warmups + args.repeats):
            if limit.over:
                return
            if turn == args.warmups:
                watch = Watch()
            for name in sorted(engines, reverse=bool(turn % 2)):
                took = decode_step(engines[name], prompts, args.decode_tokens)
                if turn >= args.warmups:
                    steps[name].append(took)
            if watch is not None:
                quiet.append(watch.lap())
            write(result)
    result["complete"] = True
    write(result)


def estimate(found) -> dict[str, float]:
    """An estimate as a dictionary of floats."""
    return {"value": found.value, "low": found.low, "high": found.high, "n": found.n}


def headline(result: dict[str, Any]) -> dict[str, Any]:
    """Medians in milliseconds and ratios to the rotating model, with 95 % intervals over the undisturbed repeats.

    If those are too few, medians are of all repeats, there are no ratios, and `disturbed` holds the reason.
    """
    out: dict[str, Any] = {"ttft_ms": {}, "ttft_over_rope_recompute": {}, "decode_step_ms": {}, "decode_over_rope": {}}
    quiet = result.get("quiet", {})
    out["disturbed"] = {name: few for name, readings in quiet.items() if (few := too_few(readings))}
    for length, cell in result["ttft"].items():
        block = f"ttft {length}"
        readings = quiet.get(block, [])
        base = pick(cell["rope recompute"]["ttft"][: len(readings) or None], readings)
        for name, runs in cell.items():
            times = pick(runs["ttft"][: len(readings) or None], readings)
            if not times:
                continue
            out["ttft_ms"][f"{length} {name}"] = estimate(median([1e3 * t for t in times]))
            if name != "rope recompute" and block not in out["disturbed"]:
                ratio = estimate(ratio_of_medians(times, base))
                out["ttft_over_rope_recompute"][f"{length} {name}"] = ratio
    for batch, cell in result["decode"].items():
        block = f"decode {batch}"
        readings = quiet.get(block, [])
        found = {name: pick(steps[: len(readings) or None], readings) for name, steps in cell["step"].items()}
        if not all(found.values()):
            continue
        for name, steps in found.items():
            out["decode_step_ms"][f"x{batch} {name}"] = estimate(median([1e3 * t for t in steps]))
        if block not in out["disturbed"]:
            out["decode_over_rope"][f"x{batch}"] = estimate(ratio_of_medians(found["cope"], found["rope"]))
    return out


def run(args: argparse.Namespace, result: dict[str, Any], write, limit: Limit) -> None:
    """Open both engines and measure; an error is recorded beside the measurements before it."""
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    from cacheslide.vllm.offline import close_engine, open_engine

    folder = Path(tempfile.mkdtemp())
    model, adapter = shaped(args.shape, folder / args.shape), folder / "adapter"
    random_tables(args.shape, adapter, args.p_max, args.slot_offsets)
    connector = {"store_device": "model", "store_gib": args.store_gib, "chunk_size": max(args.lengths)}
    options = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": max(*args.lengths, args.decode_context) + 2 * args.decode_tokens + 64,
        "max_num_batched_tokens": args.batched_tokens,
        "max_num_seqs": max(args.batches),
        "gpu_memory_utilization": args.memory,
        "enable_prefix_caching": True,
    } | args.engine
    engines: dict[str, Any] = {}
    try:
        for name, cope in (("cope", adapter), ("rope", None)):
            engines[name] = open_engine(str(model), connector, cope=cope, **options)
            result["engines"][name] = described(engines[name])
            write(result)
        measure(engines, args, result, write, limit)
    except Exception:
        result["error"] = traceback.format_exc()[-4000:]
        write(result)
    finally:
        for engine in engines.values():
            close_engine(engine)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    p.add_argument("--p-max", type=int, default=64)
    p.add_argument(
        "--slot-offsets", "--masses", action="store_true", help="random calibrated offset of the slot (CCPE)"
    )
    p.add_argument("--vocabulary", type=int, default=31000, help="ids are drawn below this")
    p.add_argument("--lengths", type=int, nargs="+", default=[8192])
    add_arguments(p, [0.05, 0.10, 0.26])
    p.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="requests that decode together")
    p.add_argument("--decode-context", type=int, default=8192)
    p.add_argument("--decode-tokens", type=int, default=64)
    p.add_argument("--repeats", type=int, default=10)
    p.add_argument("--warmups", type=int, default=2)
    p.add_argument("--batched-tokens", type=int, default=16384)
    p.add_argument("--store-gib", type=float, default=8.0)
    p.add_argument("--memory", type=float, default=0.4, help="gpu_memory_utilization of each engine")
    p.add_argument("--engine", type=json_object, default={}, help="more options of vllm.LLM, as JSON")
    p.add_argument("--commit", help="git commit of these sources, where the folder is no git checkout")
    add_minutes(p)
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write one JSON file."""
    args = parser().parse_args(argv)
    limit = Limit(args.minutes)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "commit", "minutes")}
    made_by = provenance(settings, {}, f"{args.shape}, random weights")
    made_by["git_commit"] = args.commit or made_by["git_commit"]
    conditions = {
        "weights": "random, equal in kind for both engines; CoPE tables of standard deviation 0.1, no LoRA",
        "gates": "about 0.5: rows saturate after some 2 * p_max keys",
        "ttft": "seconds by the engine's clock, one request at a time, chunks on the device, no shared prefix",
        "decode": "seconds a token and request after the first, prompts in the prefix cache, whole CUDA graphs",
        "order": "engines take turns, first and second in turns as well",
    }
    result: dict[str, Any] = {"schema": 1, "provenance": made_by, "settings": settings, "conditions": conditions}
    result |= {"complete": False, "engines": {}, "ttft": {}, "decode": {}, "quiet": {}}

    def write(found: dict[str, Any]) -> None:
        found["headline"] = headline(found)
        write_json(args.out, found)

    run(args, result, write, limit)
    print(json.dumps(result.get("headline")), result.get("error", ""), file=sys.stderr)


if __name__ == "__main__":
    command(main)
