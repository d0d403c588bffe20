"""CoPE kernel benchmark on a CUDA device: `python -m harness.experiments.kernels.cope --out FILE`.

Gate, then time: an output is compared with the plain reference in float32 before anything is timed. Every timing
records its gate statistics. Each part (prefill, decode, training) runs in its own process under a time limit, and
results are written after every case: a case that fails to compile, is wrong or hangs is recorded and the run continues.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cacheslide.kernels.cope import reference as cope_reference
from cacheslide.positions.cope import scores_and_gates
from harness.experiments.kernels.row_attention import (
    FLASH,
    FLUSH_BYTES,
    GateError,
    causal_attentions,
    median_ms,
    relative_error,
)
from harness.limit import Limit, add_minutes
from harness.quiet import watched
from harness.results.provenance import ROOT, provenance
from harness.results.records import write_json
from harness.step import command

DEVICE, DTYPE, HEADS, KV_HEADS, DIM, P_MAX, BLOCK = "cuda", torch.bfloat16, 32, 8, 128, 64, 16
LENGTHS = (16384, 8192, 4096)
# Shift of unit-variance scores: mean gates of 0.5, 0.01 and 0.0005. The last never saturate.
SHIFTS = {"mean_0.5": 0.0, "mean_0.01": -5.1, "never": -8.1}
DECODES = ((8, 16384), (1, 16384), (32, 4096))  # requests, tokens
BOUND = 1e-2  # ||out - want|| / ||want||, bfloat16
PARTS = {"prefill": 140, "decode": 120, "training": 45, "trained": 60}  # seconds; the last with --adapter only
# Lanes, keys, warps, stages; keys, stages and a maximum that stays once saturated.
TILINGS = ((64, 64, 4, 2, 64, 3, True), (64, 64, 4, 2, 64, 3, False), (128, 64, 8, 2, 64, 3, True))
TILINGS += ((128, 64, 8, 2, 64, 3, False), (128, 64, 8, 2, 128, 2, True), (128, 32, 8, 2, 64, 3, True))
TILINGS += ((64, 32, 4, 2, 32, 4, True),)
# Chunk, keys, warps, stages, launches that begin early.
DECODE_TILINGS = tuple(
    (c, *t, True) for c in (512, 1024, 2048) for t in ((32, 1, 3), (32, 1, 4), (64, 1, 3), (128, 4, 3))
)
DECODE_TILINGS += ((1024, 32, 1, 3, False), (512, 128, 4, 3, False))


def made(requests: int, tokens: int, shift: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries [requests * tokens, ...], a paged cache with shuffled blocks, its table and a position table."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    width, moved = tokens // BLOCK, (abs(shift) * DIM**0.5) ** 0.5

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=DEVICE, dtype=DTYPE)

    kv = normal(requests * width, BLOCK, KV_HEADS, 2 * DIM).transpose(1, 2)
    table = torch.randperm(len(kv), generator=torch.Generator().manual_seed(seed)).view(requests, width)
    q, embedding = normal(requests * tokens, HEADS, DIM), normal(P_MAX, DIM) * 0.1
    if moved:
        q[..., 0], kv[..., 0] = moved, -moved
        embedding[:, 0] = 0
    return q, kv, table.int().to(DEVICE), embedding


def gates_seen(q: Tensor, keys: Tensor, rows: Tensor) -> dict[str, float]:
    """Mean gate, and the share of (query, key) pairs before the sum reaches p_max - 1, over sampled rows."""
    sums, gates, saturated, pairs = 0.0, 0, 0, 0
    for i, row in enumerate(rows.tolist()):
        _, g = scores_and_gates(q[i : i + 1], keys[: row + 1], rows[i : i + 1], None)
        sums, gates = sums + float(g.sum()), gates + g.numel()
        saturated += int((g.flip(-1).cumsum(-1) >= P_MAX - 1).sum())
        pairs += g.numel()
    return {"gate_mean": sums / gates, "saturated_share": saturated / pairs}


def check(out: Tensor, want: Tensor) -> float:
    """The relative error of `out`, checked to be finite and within the bound."""
    error = relative_error(out, want)
    if not bool(out.isfinite().all()) or not error < BOUND:
        raise GateError(f"relative error {error:.3g} is not below {BOUND}, or an output is not finite")
    return error


def prefill_case(tokens: int, gates: str, repeats: int) -> dict[str, Any]:
    """Dense causal CoPE attention over a paged cache against SDPA, every tiling that compiles."""
    from cacheslide.kernels.cope import launch as cope_launch
    from cacheslide.kernels.row_attention import launch

    q, kv, table, embedding = made(1, tokens, SHIFTS[gates])
    rows = torch.arange(tokens, dtype=torch.int32, device=DEVICE)
    bounds = torch.tensor([0, tokens], dtype=torch.int32, device=DEVICE)
    blocks = cope_launch.paged(kv, table)
    pick = torch.arange(tokens - 1, 0, -(tokens // 96), device=DEVICE).flip(0)
    some = torch.tensor([0, len(pick)])
    want = cope_reference.cope_attention(q[pick].float(), rows[pick], some, table, kv.float(), embedding.float())
    keys = kv[table[0].long()].transpose(1, 2).flatten(0, 1)[..., :DIM]
    case = {"tokens": tokens, "gates": gates, **gates_seen(q[pick][::8], keys, rows[pick][::8]), "tilings": {}}
    runs, errors = {}, {}
    for option in TILINGS:
        cut = cope_launch.CopeTiling(*option[:4], False, *option[4:])
        out = torch.full_like(q, float("nan"))

        def ours(cut=cut, out=out) -> Tensor:
            return cope_launch.cope_attention(q, rows, bounds, blocks, embedding, None, out, tokens - 1, tiling=cut)

        name = "x".join(map(str, option))
        try:
            errors[name] = check(ours()[pick], want)
            runs[name] = ours
        except Exception as failed:
            case["tilings"][name] = {"error": f"{type(failed).__name__}: {str(failed)[:300]}"}
    plain = torch.empty_like(q)
    runs["row_attention"] = lambda: launch.row_attention(q, rows, bounds, table, kv, out=plain, max_row=tokens - 1)
    ms = median_ms(runs | causal_attentions(HEADS, HEADS, tokens), repeats)
    work = 4 * HEADS * DIM * tokens * (tokens + 1) / 2
    case["sdpa"] = {name: {"ms": ms[name], "tflops": work / ms[name] / 1e9} for name in FLASH if name in ms}
    case["row_attention"] = {"ms": ms["row_attention"], "tflops": work / ms["row_attention"] / 1e9}
    for name, error in errors.items():
        case["tilings"][name] = {"ms": ms[name], "tflops": work / ms[name] / 1e9, "relative_error": error}
    best = min(errors, key=lambda name: ms[name])
    fastest = min(x["ms"] for x in case["sdpa"].values())
    return case | {"best_tiling": best, "ms": ms[best], "ratio_to_sdpa": ms[best] / fastest}


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    """`run` as a CUDA graph, as serving replays decode steps, without host launch cost."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def decode_case(requests: int, tokens: int, gates: str, repeats: int) -> dict[str, Any]:
    """One row a request over a paged cache against row attention, split over its keys, at its best tiling."""
    from cacheslide.kernels.cope import decode as cope_decode
    from cacheslide.kernels.cope import launch as cope_launch
    from cacheslide.kernels.row_attention import launch

    q, kv, table, embedding = made(requests, tokens, SHIFTS[gates])
    q = q[:requests].clone()
    rows = torch.full((requests,), tokens - 1, dtype=torch.int32, device=DEVICE)
    bounds = torch.arange(requests + 1, dtype=torch.int32, device=DEVICE)
    blocks, case, runs, errors = cope_launch.paged(kv, table), {}, {}, {}
    want = cope_reference.cope_attention(q.float(), rows, bounds, table, kv.float(), embedding.float())
    keys = kv[table[0].long()].transpose(1, 2).flatten(0, 1)[..., :DIM]
    case |= {"requests": requests, "tokens": tokens, "gates": gates, **gates_seen(q[:1], keys, rows[:1]), "tilings": {}}
    own = cope_decode.choose_decode_tiling(requests, KV_HEADS, tokens, launch.device_of(q).multiprocessors)
    case["chosen_tiling"] = vars(own)
    for option in (None, *DECODE_TILINGS):
        cut = None if option is None else cope_decode.DecodeTiling(*option)
        name = "chosen" if option is None else "x".join(map(str, option))
        out = torch.full_like(q, float("nan"))

        def ours(cut=cut, out=out) -> Tensor:
            return cope_decode.cope_decode(q, rows, blocks, embedding, out=out, max_row=tokens - 1, tiling=cut)

        try:
            errors[name] = check(ours(), want)
            runs[name] = ours
        except Exception as failed:
            case["tilings"][name] = {"error": f"{type(failed).__name__}: {str(failed)[:300]}"}
    contenders = {}
    for lanes, warps, stages in ((16, 4, 4), (64, 4, 3)):
        for chunk in (256, 512, 1024, 2048, 4096):
            cut = launch.Tiling(lanes=lanes, warps=warps, stages=stages, chunk=chunk)

            def plain(cut=cut) -> Tensor:
                return launch.row_attention(q, rows, bounds, table, kv, max_row=tokens - 1, tiling=cut)

            try:
                plain()
            except Exception as failed:
                case[f"row_attention_{lanes}_{chunk}"] = {"error": f"{type(failed).__name__}: {str(failed)[:200]}"}
                continue
            contenders[f"row_attention_{lanes}_{chunk}"] = plain
    ms = median_ms({name: captured(run) for name, run in (runs | contenders).items()}, repeats)
    read = requests * tokens * KV_HEADS * 2 * DIM * DTYPE.itemsize
    for name, error in errors.items():
        case["tilings"][name] = {"ms": ms[name], "gigabytes_per_s": read / ms[name] / 1e6, "relative_error": error}
    best, rival = min(errors, key=lambda n: ms[n]), min(contenders, key=lambda n: ms[n])
    case["row_attention"] = {"tiling": rival, "ms": ms[rival], "gigabytes_per_s": read / ms[rival] / 1e6}
    return case | {"best": best, "ms": ms[best], "ratio_to_row_attention": ms[best] / ms[rival]}


def training_case(tokens: int, gates: str, repeats: int) -> dict[str, Any]:
    """Forward and backward over whole sequences against SDPA's; the gradients are checked on a short piece."""
    from cacheslide.kernels.cope.training import cope_attention

    g = torch.Generator(DEVICE).manual_seed(1)
    moved = (abs(SHIFTS[gates]) * DIM**0.5) ** 0.5

    def sequence(length: int) -> list[Tensor]:
        shapes = [(1, n, length, DIM) for n in (HEADS, KV_HEADS, KV_HEADS)]
        q, k, v = (torch.randn(s, generator=g, device=DEVICE, dtype=DTYPE) for s in shapes)
        if moved:
            q[..., 0], k[..., 0] = moved, -moved
        embedding = torch.randn(P_MAX, DIM, generator=g, device=DEVICE, dtype=DTYPE) * 0.1
        return [x.requires_grad_() for x in (q, k, v, embedding)]

    mine = sequence(500)
    exact = [x.detach().cpu().float().requires_grad_() for x in mine]
    do = torch.randn(mine[0].shape, generator=g, device=DEVICE, dtype=DTYPE)
    cope_attention(*mine).backward(do)
    cope_attention(*exact).backward(do.cpu().float())
    errors = {n: relative_error(a.grad.cpu(), b.grad) for n, a, b in zip("qkve", mine, exact, strict=True)}
    if not max(errors.values()) < 0.08:  # at a kink of the table entries a pair's gradient differs
        raise GateError(f"gradients err by {errors}")
    q, k, v, embedding = sequence(tokens)
    do = torch.randn(q.shape, generator=g, device=DEVICE, dtype=DTYPE)
    wide = [x.detach().repeat_interleave(HEADS // KV_HEADS, 1).requires_grad_() for x in (k, v)]

    def sdpa() -> None:
        F.scaled_dot_product_attention(q, *wide, is_causal=True).backward(do)

    ms = median_ms({"cope": lambda: cope_attention(q, k, v, embedding).backward(do), "sdpa": sdpa}, repeats)
    return {"tokens": tokens, "gates": gates, "gradient_errors": errors, "ms": ms, "ratio": ms["cope"] / ms["sdpa"]}


CASES: dict[str, Callable[[int], Sequence[tuple[str, Callable[[], dict]]]]] = {
    "prefill": lambda n: [
        (f"{t}_{g}", lambda t=t, g=g: prefill_case(t, g, n)) for t in LENGTHS for g in SHIFTS
    ],
    "decode": lambda n: [
        (f"{r}x{t}_{g}", lambda r=r, t=t, g=g: decode_case(r, t, g, n)) for r, t in DECODES for g in SHIFTS
    ],
    "training": lambda n: [(f"{4096}_{g}", lambda g=g: training_case(4096, g, n)) for g in SHIFTS],
}  # fmt: skip


def run_part(part: str, out: Path, repeats: int, trained: tuple[Path, Path] | None = None) -> None:
    """All cases of a part, written after each; `trained` are the folders of a model and its adapter."""
    torch.manual_seed(0)
    done: dict[str, Any] = {}
    if part == "trained":
        from harness.experiments.kernels import cope_trained

        cases = cope_trained.cases(*trained, cope_trained.Tools(check, gates_seen, FLASH), repeats)
    else:
        cases = CASES[part](repeats)
    for name, case in cases:
        started = time.monotonic()
        try:
            with watched() as quiet:
                done[name] = case()
            done[name]["quiet"] = quiet
        except Exception as failed:
            done[name] = {"error": f"{type(failed).__name__}: {str(failed)[:500]}"}
        done[name]["seconds"] = round(time.monotonic() - started, 1)
        shown = {
            k: v
            for k, v in done[name].items()
            if k in ("ms", "ratio_to_sdpa", "ratio_to_row_attention", "ratio", "error")
        }
        print(part, name, json.dumps(shown), flush=True)
        write_json(out, done)


def headline(parts: dict[str, dict]) -> dict[str, float | None]:
    """The three headline numbers: the slower of two unsaturated gate settings, the slowest decode at 8 x 16k."""

    def worst(part: str, names: list[str], key: str) -> float | None:
        found = [parts.get(part, {}).get(name, {}).get(key) for name in names]
        return None if None in found else max(found)

    slow = ["16384_mean_0.01", "16384_never"]
    return {
        "cope_vs_sdpa_16k_saturating": worst("prefill", ["16384_mean_0.5"], "ratio_to_sdpa"),
        "cope_vs_sdpa_16k_unsaturated": worst("prefill", slow, "ratio_to_sdpa"),
        "cope_decode_vs_row_attention": worst("decode", [f"8x16384_{g}" for g in SHIFTS], "ratio_to_row_attention"),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts one after the other and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--commit", help="git commit of these sources, where the folder is no git checkout")
    parser.add_argument("--model", type=Path, default=ROOT / "models/tiny-llama-12m", help="the adapter's base model")
    parser.add_argument("--adapter", type=Path, help="a trained CoPE adapter: its own gates are timed too")
    add_minutes(parser)
    parser.add_argument("--part", choices=PARTS, help="run this part alone, here, and write its cases only")
    args = parser.parse_args(argv)
    limit = Limit(args.minutes)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.part:
        return run_part(args.part, args.out, args.repeats, (args.model, args.adapter))
    sources = [*sorted((ROOT / "cacheslide/kernels/cope").glob("*.py")), Path(__file__).resolve()]
    made_by = provenance({"repeats": args.repeats, "tilings": TILINGS, "seconds": PARTS}, {}, "random tensors")
    made_by["git_commit"] = made_by["git_commit"] or args.commit
    made_by["source_sha256"] = {str(f.relative_to(ROOT)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sources}
    conditions = {
        "shape": f"{HEADS} heads, {KV_HEADS} KV heads, head_dim {DIM}, p_max {P_MAX}, shuffled blocks of {BLOCK}",
        "dtype": "bfloat16, float32 accumulation, gates summed in float16",
        "timing": f"CUDA events, median of {args.repeats} after 2 warm-ups, contenders interleaved",
        "decode": "every contender replays a CUDA graph",
        "cache": f"{FLUSH_BYTES >> 20} MiB overwritten before every launch",
        "gates": "sigmoid of scores of unit variance shifted by a constant; the measured mean stands with each case",
        "operations": "4 * heads * head_dim * sum(row + 1): a multiply-add counts as two, gate arithmetic not at all",
        "sdpa": "the faster of PyTorch's FlashAttention and cuDNN backends, causal, KV heads repeated beforehand",
        "row attention": "this repository's kernel (no position entries), split over keys, its best tiling",
        "headline": "ratios of times; unsaturated is the slower of mean 0.01 and never, decode the slowest at 8 x 16k",
    }
    result: dict[str, Any] = {"schema": 1, "provenance": made_by, "conditions": conditions}
    for part, seconds in PARTS.items():
        if limit.over or (part == "trained" and not args.adapter):
            continue
        seconds = min(seconds, limit.left)
        file = args.out.with_suffix(f".{part}.tmp")
        call = [sys.executable, "-m", "harness.experiments.kernels.cope", "--part", part, "--out", str(file)]
        call += ["--model", str(args.model), "--adapter", str(args.adapter)] if args.adapter else []
        state = "finished"
        try:
            code = subprocess.run([*call, "--repeats", str(args.repeats)], timeout=seconds, cwd=ROOT).returncode
            state = state if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            state = f"stopped after {seconds:.0f} s"
        result[part] = {"state": state, "cases": json.loads(file.read_text()) if file.is_file() else {}}
        file.unlink(missing_ok=True)
        result["headline"] = headline({p: result[p]["cases"] for p in PARTS if p in result})
        write_json(args.out, result)
    print(json.dumps(result.get("headline")), flush=True)


if __name__ == "__main__":
    command(main)
