"""Load-write decoupling (paper section 4.4, Fig. 12a): a layer's cached KV loads while its corrections are computed.

Three orders of the same work, with the same result:

locked     the layer is loaded, then its selected rows are recomputed and written over the loaded ones;
relocate   both start at once; rows whose recomputation ends before the load go to spare slots, and the row's slot is
           repointed; otherwise they are written in place (the paper's);
disjoint   both start at once; the cached selected rows come first, for fusion, and the loader scatters only the rows
           that are not recomputed: the two never write the same slot, so no spare slots are needed.

Layers are read by threads into staging buffers (pinned beside a GPU) and copied on a stream of their own. On a GPU a
layer is copied once and its selected rows are gathered from the copy: gathering on the host would take longer than the
whole copy. The host waits only for reads; events order the two streams.
"""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from cacheslide.errors import ConfigError

ORDERS = ("locked", "relocate", "disjoint")


class LayerSource(Protocol):
    """Cached KV of a request's reused rows in a tier below the GPU.

    The attribute `resident`, if true, marks rows in host memory, whose reads take no time worth delaying.
    """

    def read(self, layer: int, out: Tensor) -> Tensor:
        """A layer's keys and values in row order, [rows, 2, kv_heads, head_dim] on the CPU.

        Returns `out`, filled, or the source's own memory (pinned beside a GPU), which does not change.
        """
        ...


class LayerWork(Protocol):
    """The model's work in a layer. Called on the caller's stream, layer after layer."""

    def recompute(self, layer: int) -> Tensor:
        """Fresh K/V of the selected rows, [selected, 2, kv_heads, head_dim]; needs no cached KV of this layer."""
        ...

    def fuse(self, layer: int, fresh: Tensor, cached: Tensor) -> Tensor:
        """The rows to write, from the fresh and the cached KV of the selected rows (WCA's fusion)."""
        ...

    def attend(self, layer: int, kv: Tensor, slots: Tensor) -> None:
        """Attention and the rest of the layer over kv [all slots, 2, kv_heads, head_dim], row i at slots[i]."""
        ...


@dataclass
class PagedKV:
    """A request's slots in a paged KV cache.

    Attributes
    ----------
    kv : Tensor [layers, slots, 2, kv_heads, head_dim]
    slots : Tensor [layers, rows], int64, on the device of `kv`
        Slot of each reused row in each layer; "relocate" changes it.
    spare : Tensor [n], int64
        Free slots for relocated rows; at least as many as selected rows.
    """

    kv: Tensor
    slots: Tensor
    spare: Tensor


@dataclass
class RunReport:
    """Timings of a run.

    Attributes
    ----------
    layer_s : list of float
        Seconds from the end of the previous layer's work to the end of this one's; on a GPU by CUDA events.
    load_s : float
        Total seconds of the loads, reads and copies.
    relocated : int
        Number of rows moved to spare slots.
    """

    order: str
    layer_s: list[float] = field(default_factory=list)
    load_s: float = 0.0
    relocated: int = 0


class _Loaded:
    """A layer being loaded: cached selected rows on the device, and the end of the load."""

    def __init__(self, gate: "torch.cuda.Event | None") -> None:
        self.gate = gate
        self.first: Tensor | None = None
        self.first_ready = threading.Event()
        self.done: Future | None = None
        self.begun: torch.cuda.Event | None = None
        self.mark: torch.cuda.Event | None = None
        self.first_mark: torch.cuda.Event | None = None
        self.host_s = 0.0

    @property
    def over(self) -> bool:
        """Whether the load has ended."""
        return self.done.done() and (self.mark is None or self.mark.query())


class LoadWrite:
    """Runs layers in one of the orders.

    Parameters
    ----------
    order : str
        "locked", "relocate" or "disjoint".
    staging : int
        Layers in flight, each with its own buffer. 1: a layer's load starts when the layer before has been computed; n:
        n - 1 more layers are loaded ahead.
    workers : int
        Reader threads.
    """

    def __init__(self, order: str, staging: int = 2, workers: int = 2) -> None:
        if order not in ORDERS:
            raise ConfigError(f"unknown load-write order {order!r}: choose {', '.join(ORDERS)}")
        if staging < 1 or workers < 1:
            raise ConfigError("staging and workers must be at least 1")
        self.order, self.staging, self.workers = order, staging, workers

    def run(self, source: LayerSource, target: PagedKV, selected: Tensor, work: LayerWork, first: int = 0) -> RunReport:
        """Complete layers [first, layers) of `target`; `selected` int64 ascending indices of the corrected rows."""
        layers = target.kv.shape[0]
        job = _Run(self, source, target, selected)
        report = RunReport(self.order)
        waiting: dict[int, _Loaded] = {}
        with ThreadPoolExecutor(self.workers, "cacheslide-layer") as pool:
            try:
                clock = _Clock(job.device)
                for layer in range(first, layers):
                    gate = clock.marks[-1] if job.cuda else None
                    for ahead in range(layer, min(layer + self.staging, layers)):
                        if ahead not in waiting:
                            waiting[ahead] = job.start(pool, ahead, gate)
                    loaded = waiting[layer]
                    job.layer(layer, loaded, work, report)
                    clock.tick()
                report.layer_s = clock.seconds()
                report.load_s = sum(job.seconds(loaded) for loaded in waiting.values())
            finally:
                for left in waiting.values():
                    left.done.cancel()
        return report


class _Clock:
    """Times between ticks, on the host or on the device's current stream."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.marks: list = []
        self.tick()

    def tick(self) -> None:
        """Mark the end of a layer."""
        if self.stream is None:
            self.marks.append(time.perf_counter())
            return
        self.marks.append(torch.cuda.Event(enable_timing=True))
        self.marks[-1].record(self.stream)

    def seconds(self) -> list[float]:
        """Seconds between consecutive ticks; waits for the device."""
        if self.stream is None:
            return [b - a for a, b in pairwise(self.marks)]
        self.marks[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(self.marks)]


class _Run:
    """The state of one run."""

    def __init__(self, plan: LoadWrite, source: LayerSource, target: PagedKV, selected: Tensor) -> None:
        self.plan, self.source, self.target, self.device = plan, source, target, target.kv.device
        self.cuda = self.device.type == "cuda"
        rows, shape = target.slots.shape[1], target.kv.shape[2:]
        self.selected_host, self.selected = selected.cpu(), selected.to(self.device)
        mask = torch.ones(rows, dtype=torch.bool)
        mask[self.selected_host] = False
        self.rest = mask.nonzero()[:, 0].to(self.device)
        self.home = target.slots.clone()  # the loader's slots, unaffected by relocation
        like = {"dtype": target.kv.dtype} | ({"pin_memory": True} if self.cuda else {})
        # Buffers, each with the event of the copy that may still read it.
        self.free = [(torch.empty((rows, *shape), **like), None) for _ in range(plan.staging)]
        self.guard = threading.Condition()
        self.stream = None
        if self.cuda:
            self.stream = torch.cuda.Stream(self.device)
            self.stream.wait_stream(torch.cuda.current_stream(self.device))  # waits for work that prepares the target

    def start(self, pool: ThreadPoolExecutor, layer: int, gate: "torch.cuda.Event | None") -> _Loaded:
        """Start loading a layer; on a GPU not before `gate`."""
        loaded = _Loaded(gate)
        loaded.done = pool.submit(self._load, layer, loaded)
        return loaded

    def _load(self, layer: int, loaded: _Loaded) -> None:
        with self.guard:
            self.guard.wait_for(lambda: self.free)
            buffer, reader = self.free.pop(0)
        try:
            if reader is not None:
                reader.synchronize()
            if loaded.gate is not None and not getattr(self.source, "resident", False):
                loaded.gate.synchronize()
            begun = time.perf_counter()
            held = self.source.read(layer, buffer)
            if self.cuda:
                loaded.host_s = time.perf_counter() - begun
                with torch.cuda.stream(self.stream):
                    self._copy(layer, loaded, held)
            else:
                self._scatter(layer, loaded, held)
                loaded.host_s = time.perf_counter() - begun
        finally:
            loaded.first_ready.set()
            with self.guard:
                self.free.append((buffer, loaded.mark))
                self.guard.notify()

    def _copy(self, layer: int, loaded: _Loaded, held: Tensor) -> None:
        """Issue the copy of a layer to the GPU and into its slots."""
        if loaded.gate is not None:
            self.stream.wait_event(loaded.gate)
        loaded.begun = self._mark(timing=True)
        self._scatter(layer, loaded, held.to(self.device, non_blocking=True))
        loaded.mark = self._mark(timing=True)

    def _scatter(self, layer: int, loaded: _Loaded, rows: Tensor) -> None:
        """Copy the selected rows first, if needed separately, then the loader's rows into their slots."""
        slots = self.home[layer]
        if self.plan.order != "locked":
            loaded.first = rows[self.selected]
            loaded.first_mark = self._mark()
            loaded.first_ready.set()
        if self.plan.order == "disjoint":
            rows, slots = rows[self.rest], slots[self.rest]
        self.target.kv[layer].index_copy_(0, slots, rows)

    def _mark(self, timing: bool = False) -> "torch.cuda.Event | None":
        if not self.cuda:
            return None
        mark = torch.cuda.Event(enable_timing=timing)
        mark.record(self.stream)
        return mark

    def seconds(self, loaded: _Loaded) -> float:
        """Duration of a layer's load."""
        copied = 0.0
        if loaded.mark is not None:
            loaded.mark.synchronize()
            copied = loaded.begun.elapsed_time(loaded.mark) / 1e3
        return loaded.host_s + copied

    def layer(self, layer: int, loaded: _Loaded, work: LayerWork, report: RunReport) -> None:
        """Run one layer in the chosen order."""
        kv, slots = self.target.kv[layer], self.target.slots[layer]
        if self.plan.order == "locked":
            self._wait(loaded)
            fresh = work.recompute(layer)
            kv[slots[self.selected]] = work.fuse(layer, fresh, kv[slots[self.selected]])
        else:
            fresh = work.recompute(layer)
            fused = work.fuse(layer, fresh, self._first(loaded))
            if self.plan.order == "relocate" and not loaded.over:
                spare = self.target.spare[: len(self.selected)]
                slots[self.selected] = spare
                report.relocated += len(spare)
            kv[slots[self.selected]] = fused
            self._wait(loaded)
        loaded.first = None
        work.attend(layer, kv, slots)

    def _first(self, loaded: _Loaded) -> Tensor:
        """The cached selected rows, on the device."""
        loaded.first_ready.wait()
        if loaded.first is None:
            loaded.done.result()  # raises the load's exception
        if loaded.first_mark is not None:
            torch.cuda.current_stream(self.device).wait_event(loaded.first_mark)
            loaded.first.record_stream(torch.cuda.current_stream(self.device))
        return loaded.first

    def _wait(self, loaded: _Loaded) -> None:
        """Make later work wait for the layer's load; raises the load's exception."""
        loaded.done.result()
        if loaded.mark is not None:
            torch.cuda.current_stream(self.device).wait_event(loaded.mark)
