"""Layer latency of the three load-write orders (Fig. 12a): real reads, real projections and attention, equal results.

A layer of a Mistral-7B-like model (GPU) or of a small one (CPU), random weights, a batch of requests: load the cached
rows of every request, compute K and V of the selected rows, fuse, write, attend. A layer's step begins with the output
projection and the MLP behind the attention before: its fresh K and V depend on them, its cached K and V do not,
so its load can overlap them. The last step includes the last MLP, so a run does all of the model's work once.

Before anything is timed, the three orders must give the same output from a cache full of NaN. Then they take turns,
in another sequence every round.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from cacheslide.errors import DataError
from cacheslide.store.base import ChunkKV
from cacheslide.store.persistent.filetier import FileOptions, FileTier, chunk_name, namespace_id
from cacheslide.store.persistent.record import Encoded
from cacheslide.store.slide.layers import FileLayers, HostLayers
from cacheslide.store.slide.overlap import ORDERS, LayerSource, LoadWrite, PagedKV
from harness.experiments.slide.faults import made_key
from harness.limit import Limit
from harness.metrics.bootstrap import median, ratio_of_medians
from harness.quiet import Reading, Watch
from harness.results.undisturbed import pick, too_few

_LEAST = 3  # rounds of a cell that the limit on time cuts short; one with fewer is dropped
_SAME = 2e-2  # relative error up to which outputs on a GPU count as the same; a misplaced row gives far more


@dataclass(frozen=True)
class Shape:
    """A model's layer and a request: sizes in elements and tokens; this ratio of cached tokens is selected."""

    layers: int = 32
    hidden: int = 4096
    mlp: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    tokens: int = 4096
    recompute_ratio: float = 0.26
    dtype: str = "bfloat16"


SHAPES = {
    "cuda": Shape(),
    "cpu": Shape(6, 256, 512, 8, 4, 64, 512, dtype="float32"),
}
REPEATS = {"cuda": {"host": 20, "file": 6}, "cpu": {"host": 5, "file": 5}}


class LayerModel:
    """The selected rows' way through the layers, for a batch of requests, seeded; implements `LayerWork`."""

    def __init__(self, shape: Shape, batch: int, selected: Tensor, device: str) -> None:
        self.shape, self.batch = shape, batch
        dtype = getattr(torch, shape.dtype)
        g = torch.Generator(device=device).manual_seed(5)

        def matrix(a: int, b: int) -> Tensor:
            return (torch.randn(a, b, generator=g, device=device) / a**0.5).to(dtype)

        s = shape
        self.w_qkv = matrix(s.hidden, (s.heads + 2 * s.kv_heads) * s.head_dim)
        self.w_o = matrix(s.heads * s.head_dim, s.hidden)
        self.w_up, self.w_down = matrix(s.hidden, 2 * s.mlp), matrix(s.mlp, s.hidden)
        self.per = len(selected) // batch
        self.start = torch.randn(len(selected), s.hidden, generator=g, device=device).to(dtype)
        self.reset()

    def reset(self) -> None:
        """Back to the first layer's input."""
        self.x, self.mixed = self.start, None

    def recompute(self, layer: int) -> Tensor:
        """See `LayerWork`: the rest of the layer before, and this one's projections."""
        self._finish()
        s = self.shape
        qkv = (self._norm() @ self.w_qkv).view(len(self.x), s.heads + 2 * s.kv_heads, s.head_dim)
        self.q = qkv[:, : s.heads].view(self.batch, self.per, s.heads, s.head_dim)
        return qkv[:, s.heads :].view(-1, 2, s.kv_heads, s.head_dim)

    def fuse(self, layer: int, fresh: Tensor, cached: Tensor) -> Tensor:
        """See `LayerWork`; half of each."""
        return torch.lerp(cached, fresh, 0.5)

    def attend(self, layer: int, kv: Tensor, slots: Tensor) -> None:
        """See `LayerWork`: attention of the selected rows over all rows of their request."""
        out = []
        for q, where in zip(self.q, slots.chunk(self.batch), strict=True):
            k, v = kv[where].unbind(1)
            heads = [x.transpose(0, 1)[None] for x in (q, k, v)]
            out.append(scaled_dot_product_attention(*heads, enable_gqa=True)[0].transpose(0, 1).flatten(1))
        self.mixed = torch.cat(out)
        if layer == self.shape.layers - 1:
            self._finish()

    def _finish(self) -> None:
        """Output projection and MLP behind the attention that was computed last."""
        if self.mixed is None:
            return
        self.x = self.x + self.mixed @ self.w_o
        gate, up = (self._norm() @ self.w_up).chunk(2, dim=1)
        self.x, self.mixed = self.x + (silu(gate) * up) @ self.w_down, None

    def _norm(self) -> Tensor:
        return rms_norm(self.x, self.x.shape[-1:])


def _chunks(shape: Shape, batch: int, device: str) -> list[ChunkKV]:
    """Random chunks on the host, made on the device: there are gigabytes of them."""
    g = torch.Generator(device=device).manual_seed(6)
    dtype = getattr(torch, shape.dtype)
    size = (shape.layers, shape.tokens, shape.kv_heads, shape.head_dim)

    def some() -> Tensor:
        return torch.randn(size, generator=g, device=device, dtype=dtype).cpu()

    return [ChunkKV(some(), some(), torch.arange(shape.tokens)) for _ in range(batch)]


def _target(shape: Shape, batch: int, selected: Tensor, device: str) -> PagedKV:
    rows = shape.tokens * batch
    slots = rows + len(selected)
    size = (shape.layers, slots, 2, shape.kv_heads, shape.head_dim)
    kv = torch.full(size, float("nan"), dtype=getattr(torch, shape.dtype), device=device)
    order = torch.randperm(slots, generator=torch.Generator().manual_seed(7)).to(device)
    return PagedKV(kv, order[:rows].repeat(shape.layers, 1), order[rows:])


def measure(
    folder: Path,
    device: str,
    batches: Sequence[int] = (2, 4, 6),
    repeats: int | None = None,
    shape: Shape | None = None,
    sources: Sequence[str] = ("host", "file"),
    stagings: Sequence[int] = (1, 2),
    known: Mapping[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda record: None,
    limit: Limit | None = None,
) -> dict[str, Any]:
    """Seconds a layer by source, batch, staging and order: every round's, and the median with its interval.

    `staging` 1 is the paper's question: a layer's load starts with the layer. With 2 the next layer's load runs ahead
    in every order, "locked" too. Sources are measured one after the other, since files take far longer than the rest.

    `keep` is given the record after every cell. `known`, the record of an interrupted run of the same kind, is
    continued. Cells beyond `limit` are left out, and the record is not `complete`.
    """
    kind, limit = torch.device(device).type, limit or Limit()
    shape, rounds = shape or SHAPES[kind], REPEATS[kind] if repeats is None else dict.fromkeys(sources, repeats)
    record = {"device": kind, "shape": asdict(shape), "rounds": rounds, "complete": False, "rows": []}
    if known is not None and all(known.get(k) == record[k] for k in ("device", "shape", "rounds", "complete")):
        record["rows"] = list(known["rows"])
    wanted = [(source, batch, staging) for source in sources for batch in batches for staging in stagings]
    done = {(r["source"], r["batch"], r["staging"]) for r in record["rows"]}
    for name, batch in dict.fromkeys(cell[:2] for cell in wanted if cell not in done):
        if limit.over:
            break
        chunks = _chunks(shape, batch, device)
        g = torch.Generator().manual_seed(8)
        count = int(shape.recompute_ratio * shape.tokens)
        picks = [
            torch.randperm(shape.tokens, generator=g)[:count].sort().values + b * shape.tokens for b in range(batch)
        ]
        selected = torch.cat(picks).to(device)
        model = LayerModel(shape, batch, selected, device)
        source = HostLayers.of(chunks) if name == "host" else _file_source(folder / f"batch-{batch}", chunks)
        for staging in stagings:
            if (name, batch, staging) in done or limit.over:
                continue
            cell = {"source": name, "batch": batch, "staging": staging}
            rows = _compare(cell, shape, source, model, selected, device, rounds[name], limit)
            record["rows"] += rows
            done |= {(name, batch, staging)} if rows else set()
            record["complete"] = done.issuperset(wanted)
            keep(record)
            print(cell, {r["order"]: round(1e3 * r["layer_s"]["value"], 3) for r in rows}, flush=True)
    return record


def _file_source(folder: Path, chunks: list[ChunkKV]) -> FileLayers:
    size = sum(c.nbytes for c in chunks)
    tier = FileTier(FileOptions(folder, 2 * size + (64 << 20), shards=1, segment_bytes=1 << 30, direct=True))
    names = [chunk_name(namespace_id(""), made_key(i)) for i in range(len(chunks))]
    for name, chunk in zip(names, chunks, strict=True):  # one at a time: an encoded chunk is a second copy of it
        tier.write([Encoded.of(name, chunk, 16)])
    return FileLayers(tier, names, [len(c.positions) for c in chunks])


def _compare(
    cell: dict[str, Any],
    shape: Shape,
    source: LayerSource,
    model: LayerModel,
    selected: Tensor,
    device: str,
    rounds: int,
    limit: Limit,
) -> list[dict[str, Any]]:
    """Rows of a cell, one an order; none if the limit leaves too few rounds.

    A round runs every order once. Disturbed rounds are left out; if too few are left, all count and `disturbed` is set.
    """
    outputs, found = {}, {o: [] for o in ORDERS}
    quiet: list[Reading] = []
    watch = None
    for number in range(rounds + 1):  # the first round warms up and is the gate
        if limit.over and number > _LEAST:
            break
        if limit.over:
            return []
        turn = number % len(ORDERS)
        for order in ORDERS[turn:] + ORDERS[:turn]:
            model.reset()
            target = _target(shape, cell["batch"], selected, device)
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize(device)
            found[order].append(LoadWrite(order, cell["staging"], workers=2).run(source, target, selected, model))
            if number == 0:
                outputs[order] = model.x
            del target
        if watch is None:
            exact = {order: _agree(order, outputs) for order in ORDERS}
            watch = Watch()
        else:
            quiet.append(watch.lap())
    cell = cell | {"quiet": quiet, "disturbed": too_few(quiet)}
    base = [sum(r.layer_s) / shape.layers for r in pick(found["locked"][1:], quiet)]
    rows = []
    for order in ORDERS:
        runs = pick(found[order][1:], quiet)
        seconds = [sum(r.layer_s) / shape.layers for r in runs]
        ratio = ratio_of_medians(seconds, base, resamples=2000)
        rows.append(
            cell
            | {
                "order": order,
                "layer_s": asdict(median(seconds, resamples=2000)),
                "rounds_s": seconds,
                "load_s": asdict(median([r.load_s / shape.layers for r in runs], resamples=2000)),
                "relocated_rows": sum(r.relocated for r in runs) // len(runs),
                "bitwise_equal": exact[order],
                "reduction_pct": {
                    "value": 100 * (1 - ratio.value),
                    "low": None if ratio.high is None else 100 * (1 - ratio.high),
                    "high": None if ratio.low is None else 100 * (1 - ratio.low),
                    "n": len(seconds),
                },
            }
        )
    return rows


def _agree(order: str, outputs: dict[str, Tensor]) -> bool:
    """Whether an order's output has the bits of "locked"; DataError when it is another result."""
    mine, locked = outputs[order], outputs["locked"]
    equal = torch.equal(mine, locked)
    close = equal or (mine.is_cuda and (mine - locked).float().norm() <= _SAME * locked.float().norm())
    if not close or not mine.isfinite().all():
        raise DataError(f"order {order!r} gives another result than 'locked': nothing was timed")
    return equal
