"""Layer latency of the three load-write orders (Fig. 12a): real reads, real projections and attention, equal results.

A layer of a Mistral-7B-like model (GPU) or of a small one (CPU): load the cached rows of every request, project K and V
of the selected rows, fuse, write, attend. Before anything is timed, the three orders must give the same output.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from cacheslide.errors import DataError
from cacheslide.store.base import ChunkKV
from cacheslide.store.filetier import FileOptions, FileTier, chunk_name, namespace_id
from cacheslide.store.layers import FileLayers, HostLayers
from cacheslide.store.overlap import ORDERS, LoadWrite, PagedKV
from cacheslide.store.record import Encoded
from harness.experiments.slide_faults import made_key
from harness.metrics.bootstrap import median


@dataclass(frozen=True)
class Shape:
    """A model's layer and a request: sizes in elements and tokens; `share` of the reused rows is selected."""

    layers: int = 32
    hidden: int = 4096
    mlp: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    tokens: int = 4096
    updated: int = 256
    share: float = 0.26
    dtype: str = "bfloat16"


SHAPES = {
    "cuda": Shape(),
    "cpu": Shape(6, 256, 512, 8, 4, 64, 512, 64, dtype="float32"),
}


class LayerModel:
    """The recomputed part of a layer for a batch of requests, seeded; implements `LayerWork`."""

    def __init__(self, shape: Shape, batch: int, selected: Tensor, device: str) -> None:
        self.shape, self.batch, self.device = shape, batch, torch.device(device)
        dtype = getattr(torch, shape.dtype)
        g = torch.Generator(device=device).manual_seed(5)

        def matrix(a: int, b: int) -> Tensor:
            return (torch.randn(a, b, generator=g, device=device) / a**0.5).to(dtype)

        s = shape
        self.w_q = matrix(s.hidden, s.heads * s.head_dim)
        self.w_kv = matrix(s.hidden, 2 * s.kv_heads * s.head_dim)
        self.w_o = matrix(s.heads * s.head_dim, s.hidden)
        self.w_up, self.w_down = matrix(s.hidden, 2 * s.mlp), matrix(s.mlp, s.hidden)
        self.per = len(selected) // batch
        self.start = torch.randn(len(selected), s.hidden, generator=g, device=device).to(dtype)
        self.reset()

    def reset(self) -> None:
        """Back to the first layer's input."""
        self.x = self.start

    def recompute(self, layer: int) -> Tensor:
        """See `LayerWork`."""
        return (self.x @ self.w_kv).view(-1, 2, self.shape.kv_heads, self.shape.head_dim)

    def fuse(self, layer: int, fresh: Tensor, cached: Tensor) -> Tensor:
        """See `LayerWork`; half of each."""
        return torch.lerp(cached, fresh, 0.5)

    def attend(self, layer: int, kv: Tensor, slots: Tensor) -> None:
        """See `LayerWork`: attention of the selected rows over all rows of their request, and the MLP."""
        s, out = self.shape, []
        q = (self.x @ self.w_q).view(self.batch, self.per, s.heads, s.head_dim)
        for b, where in enumerate(slots.chunk(self.batch)):
            k, v = kv[where].unbind(1)
            heads = [x.transpose(0, 1)[None] for x in (q[b], k, v)]
            out.append(scaled_dot_product_attention(*heads, enable_gqa=True)[0].transpose(0, 1).flatten(1))
        x = self.x + torch.cat(out) @ self.w_o
        gate, up = (x @ self.w_up).chunk(2, dim=1)
        self.x = x + (silu(gate) * up) @ self.w_down


def _chunks(shape: Shape, batch: int) -> list[ChunkKV]:
    g = torch.Generator().manual_seed(6)
    dtype = getattr(torch, shape.dtype)
    size = (shape.layers, shape.tokens, shape.kv_heads, shape.head_dim)
    return [
        ChunkKV(torch.randn(size, generator=g).to(dtype), torch.randn(size, generator=g).to(dtype),
                torch.arange(shape.tokens))
        for _ in range(batch)
    ]  # fmt: skip


def _target(shape: Shape, batch: int, selected: Tensor, device: str) -> PagedKV:
    rows = shape.tokens * batch
    slots = rows + len(selected)
    size = (shape.layers, slots, 2, shape.kv_heads, shape.head_dim)
    kv = torch.full(size, float("nan"), dtype=getattr(torch, shape.dtype), device=device)
    order = torch.randperm(slots, generator=torch.Generator().manual_seed(7)).to(device)
    return PagedKV(kv, order[:rows].repeat(shape.layers, 1), order[rows:])


def measure(
    folder: Path, device: str, batches: Sequence[int] = (2, 4, 6), repeats: int = 5, shape: Shape | None = None,
    sources: Sequence[str] = ("host", "file"), staging: int = 2,
) -> dict[str, Any]:  # fmt: skip
    """Median seconds a layer by source, batch and order, with bootstrap intervals over repeats."""
    shape = shape or SHAPES[torch.device(device).type]
    rows = []
    for batch in batches:
        chunks = _chunks(shape, batch)
        g = torch.Generator().manual_seed(8)
        count = int(shape.share * shape.tokens)
        picks = [
            torch.randperm(shape.tokens, generator=g)[:count].sort().values + b * shape.tokens for b in range(batch)
        ]
        selected = torch.cat(picks).to(device)
        model = LayerModel(shape, batch, selected, device)
        lengths = [shape.tokens] * batch
        with_file = folder / f"batch-{batch}"
        for kind in sources:
            source = HostLayers.of(chunks) if kind == "host" else _file_source(with_file, chunks, lengths)
            rows += _compare(shape, batch, kind, source, model, selected, device, repeats, staging)
    return {"device": device, "shape": asdict(shape), "staging": staging, "repeats": repeats, "rows": rows}


def _file_source(folder: Path, chunks: list[ChunkKV], lengths: list[int]) -> FileLayers:
    size = sum(c.nbytes for c in chunks)
    tier = FileTier(FileOptions(folder, 2 * size + (64 << 20), shards=1, segment_bytes=1 << 30, direct=True))
    names = [chunk_name(namespace_id(""), made_key(i)) for i in range(len(chunks))]
    tier.write([Encoded.of(n, c, 16) for n, c in zip(names, chunks, strict=True)])
    return FileLayers(tier, names, lengths)


def _compare(shape, batch, kind, source, model, selected, device, repeats, staging) -> list[dict[str, Any]]:
    outputs, times, waits, moved = {}, {o: [] for o in ORDERS}, {o: [] for o in ORDERS}, dict.fromkeys(ORDERS, 0)
    for repeat in range(repeats + 1):  # the first round warms up and is the gate
        for order in ORDERS:
            model.reset()
            target = _target(shape, batch, selected, device)
            begun = time.perf_counter()
            report = LoadWrite(order, staging, workers=2).run(source, target, selected, model)
            whole = time.perf_counter() - begun
            if repeat == 0:
                outputs[order] = model.x
                continue
            times[order].append(whole / shape.layers)
            waits[order].append(report.wait_s / shape.layers)
            moved[order] += report.relocated
        if repeat == 0:
            for order in ORDERS[1:]:
                if not torch.equal(outputs[order], outputs["locked"]) or not outputs[order].isfinite().all():
                    raise DataError(f"order {order!r} gives another result than 'locked': nothing was timed")
    base = statistics.median(times["locked"])
    return [
        {
            "source": kind,
            "batch": batch,
            "order": order,
            "layer_s": asdict(median(times[order], resamples=2000)),
            "wait_s": statistics.median(waits[order]),
            "relocated_rows": moved[order] // repeats,
            "reduction_pct": 100 * (1 - statistics.median(times[order]) / base),
        }
        for order in ORDERS
    ]
