"""Kernel times of a load by size: `python -m harness.experiments.kernels.load_shapes --out FILE`.

Matrix products of one layer by the number of rows, since recorded layers should be padded to sizes that fill the
device (`vllm/worker/graph_rows.py`); and row attention of a load's rows, updated text in front and recomputed tokens
behind it, by tiling, since such rows divide the work unevenly (`kernels/row_attention/launch.py`).
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.comma_lists import floats, ints
from harness.experiments.kernels.row_attention import BLOCK, DEVICE, DIM, DTYPE, SHAPES, check_rows, median_ms
from harness.experiments.serving.engines import SHAPES as MODELS
from harness.quiet import watched
from harness.results.provenance import provenance
from harness.results.records import write_json
from harness.results.rounding import rounded
from harness.step import command

LIVE, FIXED = 0.05, 0.9  # shares of the prompt: updated text in front, fixed text behind it
KINDS = ("first", "scattered")
CHUNKS = (0, 512, 1024, 2048, 4096)


def load_rows(tokens: int, ratio: float, kind: str, seed: int = 0) -> Tensor:
    """Rows that a load computes, int32 ascending: the updated text in front, and `ratio` of the fixed text behind it.

    `kind` "first" takes the fixed text's first tokens, "scattered" random ones.
    """
    live, fixed = round(LIVE * tokens), round(FIXED * tokens)
    count = round(ratio * fixed)
    order = torch.arange(fixed)
    if kind == "scattered":
        order = torch.randperm(fixed, generator=torch.Generator().manual_seed(seed))
    return torch.cat([torch.arange(live), live + order[:count].sort().values]).int()


def products(model: str, rows: Sequence[int], repeats: int) -> list[dict[str, float]]:
    """Time of a layer's four matrix products, ms, and their rate, TFLOP/s, by the number of rows."""
    shape = MODELS[model]
    heads, kv_heads, dim = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    sizes = [((heads + 2 * kv_heads) * dim, hidden), (hidden, heads * dim), (2 * inner, hidden), (hidden, inner)]
    weights = [torch.randn(out, into, device=DEVICE, dtype=DTYPE) / into**0.5 for out, into in sizes]
    found = []
    for n in rows:
        inputs = [torch.randn(n, into, device=DEVICE, dtype=DTYPE) for _, into in sizes]

        def layer(inputs=inputs) -> None:
            for x, weight in zip(inputs, weights, strict=True):
                torch.nn.functional.linear(x, weight)

        ms = median_ms({"layer": layer}, repeats)["layer"]
        work = 2 * n * sum(out * into for out, into in sizes)
        found.append({"rows": n, "ms": ms, "tflops": work / ms / 1e9})
    return found


def attention(tokens: int, ratio: float, kind: str, repeats: int) -> dict[str, Any]:
    """Row attention of one load, by tiling; each tiling's output is checked before it is timed."""
    from cacheslide.kernels.row_attention import launch

    heads, kv_heads = SHAPES["gqa"]
    rows = load_rows(tokens, ratio, kind).to(DEVICE)
    bounds, blocks = torch.tensor([0, len(rows)], dtype=torch.int32, device=DEVICE), tokens // BLOCK
    kv = torch.randn(blocks, BLOCK, kv_heads, 2 * DIM, device=DEVICE, dtype=DTYPE).transpose(1, 2)
    table = torch.randperm(blocks, generator=torch.Generator().manual_seed(1)).view(1, -1).int().to(DEVICE)
    q = torch.randn(len(rows), heads, DIM, device=DEVICE, dtype=DTYPE)
    work = launch.Work(len(rows), 1, tokens, heads, kv_heads, DIM, BLOCK, DTYPE)
    chosen = launch.choose_tiling(work, launch.device_of(q))
    tilings = {"chosen": chosen}
    for base in (launch.Tiling(), launch.SMALL):
        for chunk in CHUNKS:
            tilings[f"{base.lanes} lanes, chunk {chunk}"] = replace(base, chunk=chunk, stages=3)
    contenders: dict[str, Callable[[], Tensor]] = {
        name: lambda tiling=tiling: launch.row_attention(q, rows, bounds, table, kv, tiling=tiling)
        for name, tiling in tilings.items()
    }
    error = max(check_rows(run(), q, rows, bounds, table, kv) for run in contenders.values())
    operations = 4 * heads * DIM * float((rows.double() + 1).sum())
    ms = median_ms(contenders, repeats)
    return {
        "tokens": tokens, "recompute_ratio": ratio, "kind": kind, "rows": len(rows), "relative_error": error,
        "chosen": asdict(chosen), "ms": ms, "tflops": {name: operations / t / 1e9 for name, t in ms.items()},
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write one JSON file."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--shape", choices=MODELS, default="mistral-7b")
    p.add_argument("--rows", type=ints, default=[*range(64, 1025, 64), *range(1152, 2049, 128)])
    p.add_argument("--lengths", type=ints, default=[4096, 8192, 16384])
    p.add_argument("--ratios", type=floats, default=[0.05, 0.1])
    p.add_argument("--repeats", type=int, default=20)
    args = p.parse_args(argv)
    if not torch.cuda.is_available():
        p.error("this benchmark needs a CUDA device")
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    made: dict[str, Any] = {"provenance": provenance(settings, {}, args.shape)}
    with watched() as quiet:
        made["products"] = products(args.shape, args.rows, args.repeats)
        cases = [(n, ratio, kind) for n in args.lengths for ratio in args.ratios for kind in KINDS]
        made["attention"] = [attention(*case, args.repeats) for case in cases]
    made["quiet"] = quiet
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, rounded(made, 4))
    for row in made["products"]:
        print(json.dumps(rounded(row, 4)))
    for row in made["attention"]:
        print(json.dumps(rounded({k: row[k] for k in ("tokens", "recompute_ratio", "kind", "rows", "ms")}, 3)))


if __name__ == "__main__":
    command(main)
