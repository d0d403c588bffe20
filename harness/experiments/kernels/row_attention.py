"""Kernel benchmark on a CUDA device: `python -m harness.experiments.kernels.row_attention --out FILE`.

Gate, then time: a kernel's output is compared with a float32 reference on the same inputs before it is timed. The
contenders of a case take turns, the L2 cache is overwritten before every launch, times are medians of CUDA events.
"""

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cacheslide.kernels import api as kernels
from cacheslide.kernels.placement import reference as placement_reference
from cacheslide.kernels.row_attention import reference
from cacheslide.positions.rope import Rotary, inverse_frequencies
from harness.quiet import watched
from harness.results.provenance import ROOT, provenance
from harness.step import command

DEVICE, DTYPE, DIM, BLOCK = "cuda", torch.bfloat16, 128, 16
LENGTHS = (4096, 8192, 16384, 32768)
SHARES = (0.05, 0.10, 0.26, 0.33, 1.0)
SHAPES = {"gqa": (32, 8), "mha": (32, 32)}  # query heads, KV heads
FLASH = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
FLUSH_BYTES = 512 << 20  # several times the L2; long enough to hide the host time of a launch
GATE = {"attention": 1e-2, "placement": 1e-2, "deviation": 5e-3}  # ||out - want|| / ||want||, bfloat16


class GateError(Exception):
    """A kernel's output is wrong: nothing may be timed."""


def relative_error(out: Tensor, want: Tensor) -> float:
    """||out - want|| / ||want||; NaN where either holds NaN."""
    return float((out.float() - want.float()).norm() / want.float().norm())


def gate(kind: str, out: Tensor, want: Tensor) -> float:
    """The relative error of `out`, checked to be below the kind's bound."""
    error = relative_error(out, want)
    if not error < GATE[kind]:
        raise GateError(f"{kind}: relative error {error:.3g} is not below {GATE[kind]}")
    return error


def median_ms(contenders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median device time of each contender in ms; they take turns, so that drift hits all alike."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)
    events: dict[str, list] = {name: [] for name in contenders}
    for turn in range(repeats + 2):
        for name, run in contenders.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            run()
            end.record()
            if turn >= 2:  # warm-up
                events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}


def enqueue_us(run: Callable[[], Any], repeats: int = 50) -> float:
    """Host time of one call in µs, without waiting for the device."""
    torch.cuda.synchronize()
    samples = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        samples.append((time.perf_counter() - started) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(samples)


def active_rows(tokens: int, share: float, seed: int) -> Tensor:
    """A share of a request's rows, drawn uniformly, int32 ascending; the last one is among them."""
    count = max(1, round(share * tokens))
    drawn = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(seed))[: count - 1]
    return torch.cat([drawn, torch.tensor([tokens - 1])]).sort().values.int().to(DEVICE)


def attention_case(
    shape: str, lengths: Sequence[int], share: float, repeats: int, block: int = BLOCK, seed: int = 0
) -> dict[str, Any]:
    """Row attention over shuffled blocks against PyTorch's causal attention with as many operations."""
    heads, kv_heads = SHAPES[shape]
    parts = [active_rows(tokens, share, seed + i) for i, tokens in enumerate(lengths)]
    rows, cu_rows = torch.cat(parts), torch.tensor([0, *(len(p) for p in parts)]).cumsum(0).int().to(DEVICE)
    width = max(lengths) // block
    kv = torch.randn(width * len(lengths), block, kv_heads, 2 * DIM, device=DEVICE, dtype=DTYPE).transpose(1, 2)
    table = torch.randperm(len(kv), generator=torch.Generator().manual_seed(seed)).view(len(lengths), width)
    table = table.int().to(DEVICE)
    q = torch.randn(len(rows), heads, DIM, device=DEVICE, dtype=DTYPE)
    out = torch.full_like(q, float("nan"))

    def ours() -> Tensor:
        return kernels.row_attention(q, rows, cu_rows, table, kv, out=out, max_row=max(lengths) - 1)

    error = check_rows(ours(), q, rows, cu_rows, table, kv)
    operations = 4 * heads * DIM * float((rows.double() + 1).sum())
    contenders: dict[str, Callable] = {"row_attention": ours}
    # A causal square with as many (query, key) pairs, and one over the whole context for the library's best rate.
    equal = max(64, round((2 * operations / (4 * heads * DIM)) ** 0.5 / 64) * 64)
    squares = {"equal_flops": equal, "whole_context": max(lengths)}
    for label, side in squares.items():
        contenders |= {f"{name}_{label}": run for name, run in causal_attentions(heads, kv_heads, side).items()}
    ms = median_ms(contenders, repeats)
    work = {"equal_flops": 4 * heads * DIM * equal * (equal + 1) / 2}
    work["whole_context"] = 4 * heads * DIM * max(lengths) * (max(lengths) + 1) / 2
    rates = {name: (operations if name == "row_attention" else work[name.split("_", 1)[1]]) / t / 1e9
             for name, t in ms.items()}  # fmt: skip
    best = {label: max(r for name, r in rates.items() if name.endswith(label)) for label in squares}
    return {
        "shape": shape, "heads": heads, "kv_heads": kv_heads, "head_dim": DIM, "block_size": block,
        "context_tokens": list(lengths), "active_share": share, "rows": len(rows), "operations": operations,
        "relative_error": error, "ms": ms, "tflops": rates, "equal_flops_side": equal,
        "ratio_to_flash_at_equal_flops": rates["row_attention"] / best["equal_flops"],
        "ratio_to_flash_whole_context": rates["row_attention"] / best["whole_context"],
        "enqueue_us": enqueue_us(ours),
    }  # fmt: skip


def check_rows(out: Tensor, q: Tensor, rows: Tensor, cu_rows: Tensor, table: Tensor, kv: Tensor) -> float:
    """The largest error over the requests, of up to 128 rows each; the other rows only have to be finite."""
    if not bool(out.isfinite().all()):
        raise GateError("attention: some output was not written or is not finite")
    errors, exact = [], kv.float()
    for i in range(len(table)):
        begin, end = int(cu_rows[i]), int(cu_rows[i + 1])
        pick = torch.arange(begin, end, max(1, (end - begin) // 128), device=DEVICE)
        bounds = torch.tensor([0, len(pick)])
        want = reference.row_attention(q[pick].float(), rows[pick], bounds, table[i : i + 1], exact)
        errors.append(gate("attention", out[pick], want))
    return max(errors)


def causal_attentions(heads: int, kv_heads: int, side: int) -> dict[str, Callable[[], Any]]:
    """PyTorch's fused causal attentions over [1, heads, side, DIM]; KV heads are repeated outside the timed part."""
    q = torch.randn(1, heads, side, DIM, device=DEVICE, dtype=DTYPE)
    k, v = (torch.randn(1, kv_heads, side, DIM, device=DEVICE, dtype=DTYPE) for _ in range(2))
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    found = {}
    for name, backend in FLASH.items():

        def run(backend=backend) -> None:
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(q, k, v, is_causal=True)

        try:
            run()
        except RuntimeError:
            continue  # not built for this device
        found[name] = run
    return found


def placement_case(layers: int, rows: int, skipped: float, repeats: int, pinned: bool = False) -> dict[str, Any]:
    """Moving a chunk's rows into the paged cache against a device copy of as many bytes and plain PyTorch."""
    kv_heads, blocks = 8, rows // BLOCK + 8
    k, v = (torch.randn(layers, rows, kv_heads, DIM, device=DEVICE, dtype=DTYPE) for _ in range(2))
    if pinned:
        k, v = k.cpu().pin_memory(), v.cpu().pin_memory()
    caches = [
        torch.full((blocks, BLOCK, kv_heads, 2 * DIM), float("nan"), device=DEVICE, dtype=DTYPE).transpose(1, 2)
        for _ in range(layers)
    ]
    g = torch.Generator().manual_seed(0)
    order = torch.randperm(blocks, generator=g)
    slots = (order[:, None] * BLOCK + torch.arange(BLOCK)).flatten()[:rows]  # shuffled blocks, rows in order inside
    slots[torch.randperm(rows, generator=g)[: round(skipped * rows)]] = -1
    placed, slots = int((slots >= 0).sum()), slots.to(DEVICE)
    deltas = torch.full((rows,), 777, dtype=torch.int32, device=DEVICE)
    rotary = Rotary(inverse_frequencies(DIM, 5e5), 32768, DEVICE)
    pointers = kernels.cache_pointers(caches)

    def ours() -> None:
        kernels.place_layers(k, v, slots, deltas, caches, rotary, pointers)

    ours()
    plain = [torch.full_like(kv, float("nan")) for kv in caches]
    placement_reference.place_layers(k, v, slots, deltas, plain, rotary)
    error = 0.0
    for got, want in zip(caches, plain, strict=True):
        if not torch.equal(got.isnan(), want.isnan()):
            raise GateError("placement: the written rows differ")
        error = max(error, gate("placement", got.nan_to_num(0), want.nan_to_num(0)))
    moved = 2 * layers * placed * kv_heads * DIM * DTYPE.itemsize  # K and V, one way
    source = torch.empty(moved, dtype=torch.uint8, device="cpu" if pinned else DEVICE, pin_memory=pinned)
    target = torch.empty(moved, dtype=torch.uint8, device=DEVICE)
    ms = median_ms(
        {
            "place_layers": ours,
            "copy": lambda: target.copy_(source, non_blocking=True),
            "plain_pytorch": lambda: placement_reference.place_layers(k, v, slots, deltas, plain, rotary),
        },
        repeats,
    )
    per_byte = 1 if pinned else 2  # pinned: over the bus once; on the device: read and written
    return {
        "layers": layers, "rows": rows, "rows_placed": placed, "kv_heads": kv_heads, "head_dim": DIM,
        "source": "pinned host memory" if pinned else "device", "bytes_one_way": moved, "relative_error": error,
        "ms": ms, "gigabytes_per_s": {name: per_byte * moved / t / 1e6 for name, t in ms.items()},
        "ratio_to_copy": ms["copy"] / ms["place_layers"], "enqueue_us": enqueue_us(ours),
    }  # fmt: skip


def deviation_case(rows: int, repeats: int) -> dict[str, Any]:
    """Deviation of fresh from moved cached keys against plain PyTorch."""
    fresh, cached = (torch.randn(rows, 8, DIM, device=DEVICE, dtype=DTYPE) for _ in range(2))
    deltas = torch.randint(-4000, 4000, (rows,), device=DEVICE, dtype=torch.int32)
    rotary = Rotary(inverse_frequencies(DIM, 5e5), 32768, DEVICE)
    want = placement_reference.row_deviation(fresh, cached, deltas, rotary)
    error = gate("deviation", kernels.row_deviation(fresh, cached, deltas, rotary), want)
    ms = median_ms(
        {
            "row_deviation": lambda: kernels.row_deviation(fresh, cached, deltas, rotary),
            "plain_pytorch": lambda: placement_reference.row_deviation(fresh, cached, deltas, rotary),
        },
        repeats,
    )
    read = 2 * cached.numel() * DTYPE.itemsize
    rates = {name: read / t / 1e6 for name, t in ms.items()}
    return {"rows": rows, "bytes_read": read, "relative_error": error, "ms": ms, "gigabytes_per_s": rates}


def run_all(repeats: int) -> dict[str, Any]:
    """Every case; a case that fails its gate stops the run."""
    attention = []
    for shape in SHAPES:
        for tokens in LENGTHS:
            for share in SHARES:
                attention.append(attention_case(shape, [tokens], share, repeats))
                _say(attention[-1])
    for block in (32, 64, 128):
        attention.append(attention_case("gqa", [8192], 0.26, repeats, block))
        _say(attention[-1])
    attention.append(attention_case("gqa", [8192] * 8, 0.26, repeats))
    _say(attention[-1])
    placement = [
        placement_case(1, 7373, 0.0, repeats),
        placement_case(1, 7373, 0.26, repeats),
        placement_case(31, 922, 0.26, repeats),  # one of eight chunks of an 8k prompt, every layer behind the first
        placement_case(31, 7373, 0.26, repeats),
        placement_case(31, 922, 0.26, max(5, repeats // 4), pinned=True),
    ]
    for case in placement:
        print(case["source"], case["layers"], case["rows"], {k: round(x) for k, x in case["gigabytes_per_s"].items()})
    deviation = [deviation_case(7373, repeats)]
    print("deviation", {k: round(x) for k, x in deviation[0]["gigabytes_per_s"].items()})
    at_8k = [c for c in attention if c["shape"] == "gqa" and c["context_tokens"] == [8192] and c["block_size"] == BLOCK]
    ratios = {str(c["active_share"]): c["ratio_to_flash_at_equal_flops"] for c in at_8k}
    return {"attention": attention, "placement": placement, "deviation": deviation,
            "headline": {"row_attention_vs_flash_8k_gqa_by_share": ratios}}  # fmt: skip


def _say(case: dict[str, Any]) -> None:
    print(
        f"{case['shape']} {len(case['context_tokens'])}x{case['context_tokens'][0]} block {case['block_size']} "
        f"share {case['active_share']}: {case['ms']['row_attention']:.3f} ms, "
        + ", ".join(f"{name} {rate:.0f}" for name, rate in case["tflops"].items())
        + f" TFLOP/s; ratio {case['ratio_to_flash_at_equal_flops']:.2f} / {case['ratio_to_flash_whole_context']:.2f}",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run everything and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--commit", help="git commit of these sources, where the folder is a copy of a checkout")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    with watched() as quiet:
        results = run_all(args.repeats)
    files = [*sorted((ROOT / "cacheslide/kernels").rglob("*.py")), Path(__file__).resolve()]
    made = provenance({"repeats": args.repeats, "lengths": LENGTHS, "shares": SHARES}, {}, "random tensors")
    if args.commit:
        made |= {"git_commit": args.commit, "git_dirty": None}
    made["source_sha256"] = {str(f.relative_to(ROOT)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    conditions = {
        "dtype": "bfloat16, float32 accumulation",
        "timing": f"CUDA events, median of {args.repeats} after 2 warm-ups, contenders interleaved",
        "cache": f"{FLUSH_BYTES >> 20} MiB overwritten before every launch",
        "rows": "drawn uniformly, the last row included; blocks of the cache shuffled",
        "operations": "4 * heads * head_dim * sum(row + 1); a multiply-add counts as two",
        "flash": "the faster of PyTorch's FlashAttention and cuDNN backends, causal, KV heads repeated beforehand",
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({"schema": 1, "provenance": made, "conditions": conditions, "quiet": quiet} | results, indent=1)
        + "\n"
    )


if __name__ == "__main__":
    command(main)
