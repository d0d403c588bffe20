"""The CoPE kernel on a trained model's own queries, keys and position tables, a part of `cope_kernels`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from cacheslide.kernels.cope import reference as cope_reference
from cacheslide.models.adapter import RowGroup
from harness.backends.cope import CopeBackend
from harness.experiments.kernels.row_attention import median_ms
from harness.tasks.synthetic.prompts import examples

BATCH, TOKENS, BLOCK = 16, 4096, 16


@dataclass(frozen=True)
class Tools:
    """Functions of the benchmark: its correctness gate, its gate statistics, and SDPA's backends by name."""

    check: Callable[[Tensor, Tensor], float]
    gates_seen: Callable[[Tensor, Tensor, Tensor], dict[str, float]]
    backends: dict[str, Any]


@torch.inference_mode()
def observe(model, ids: list[list[int]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per layer q, k, v [batch, rows, heads, head_dim] of token sequences of one length, in bfloat16."""
    found: list[list[tuple[Tensor, ...]]] = [[] for _ in range(model.num_layers)]
    for sequence in ids:
        tokens = torch.tensor(sequence, device=model.device)
        rows, kv, hidden = (
            torch.arange(len(tokens), device=tokens.device),
            model.new_kv(len(tokens)),
            model.embed(tokens),
        )
        for layer in range(model.num_layers):
            qkv = model.qkv(layer, hidden, rows)
            kv.write(layer, rows, *qkv[1:])
            found[layer].append(tuple(x.bfloat16() for x in qkv))
            hidden = model.finish(layer, hidden, model.attend(layer, qkv[0], [RowGroup(kv, rows)]))
    return [tuple(torch.stack(x) for x in zip(*layer, strict=True)) for layer in found]


def sequences(backend: CopeBackend) -> list[list[int]]:
    """`BATCH` prompts of the task, cut to one length, a multiple of the block size."""
    tasks = [x for s in ("hotpotqa", "swebench") for x in examples(s, "deep", "validation", 0, BATCH // 2, TOKENS)]
    ids = [list(backend.prompt(x.segments).token_ids) for x in tasks]
    length = min(map(len, ids)) // BLOCK * BLOCK
    return [x[:length] for x in ids]


def layer_case(q: Tensor, k: Tensor, v: Tensor, table: Tensor, tools: Tools, repeats: int) -> dict[str, Any]:
    """One layer, all sequences in one call, against SDPA on the same shape."""
    from cacheslide.kernels.cope import launch as cope_launch

    batch, length, heads, dim = q.shape
    kv_heads, width = k.shape[2], length // BLOCK
    kv = torch.cat((k, v), -1).view(batch * width, BLOCK, kv_heads, 2 * dim).transpose(1, 2)
    blocks = torch.arange(batch * width, dtype=torch.int32, device=q.device).view(batch, width)
    rows = torch.arange(length, dtype=torch.int32, device=q.device).repeat(batch)
    bounds = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * length
    packed, embedding = q.reshape(batch * length, heads, dim), table.to(q.device, q.dtype)
    pick = torch.arange(0, length, max(1, length // 64), device=q.device)
    some = torch.tensor([0, len(pick)])
    want = cope_reference.cope_attention(
        packed[pick].float(), rows[pick], some, blocks[:1], kv.float(), embedding.float()
    )
    paged = cope_launch.paged(kv, blocks)

    def ours() -> Tensor:
        return cope_launch.cope_attention(packed, rows, bounds, paged, embedding, max_row=length - 1)

    error = tools.check(ours()[pick], want)
    group = heads // kv_heads
    flat = [x.transpose(1, 2).repeat_interleave(n, 1) for x, n in ((q, 1), (k, group), (v, group))]
    runs = {"cope": ours}
    for name, backend in tools.backends.items():

        def sdpa(backend=backend) -> None:
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(*flat, is_causal=True)

        try:
            sdpa()
        except RuntimeError:
            continue  # not built for this device
        runs[name] = sdpa
    ms = median_ms(runs, repeats)
    fastest = min(t for name, t in ms.items() if name != "cope")
    seen = tools.gates_seen(packed[pick][::8], k[0], rows[pick][::8])
    shape = {"sequences": batch, "tokens": length, "heads": heads, "kv_heads": kv_heads, "head_dim": dim}
    return shape | seen | {"relative_error": error, "ms": ms, "ratio_to_sdpa": ms["cope"] / fastest}


def cases(model: Path, adapter: Path, tools: Tools, repeats: int) -> list[tuple[str, Callable[[], dict]]]:
    """(name, function) for every layer of the trained model."""
    backend = CopeBackend(model, adapter, device="cuda", live=True)
    layers = observe(backend.model, sequences(backend))
    tables = backend.model.tables
    return [(f"layer_{i}", lambda i=i: layer_case(*layers[i], tables[i], tools, repeats)) for i in range(len(layers))]
