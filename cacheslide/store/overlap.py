"""Load-write decoupling (paper section 4.4, Fig. 12a): a layer's cached KV loads while its corrections are computed.

Three orders of the same work, with the same result:

locked     the layer is loaded, then its selected rows are recomputed and written over the loaded ones;
relocate   both start at once; rows whose recomputation ends before the load go to spare slots, and the row's slot is
           repointed; otherwise they are written in place (the paper's);
disjoint   both start at once; the cached selected rows come first, for fusion, and the loader scatters only the rows
           that are not recomputed: the two never write the same slot, so no spare slots are needed.

Layers are read ahead by threads into staging buffers (pinned beside a GPU) and copied on a stream of their own.
"""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from cacheslide.errors import ConfigError

ORDERS = ("locked", "relocate", "disjoint")


class LayerSource(Protocol):
    """Cached KV of a request's reused rows, somewhere below the GPU."""

    def read(self, layer: int, out: Tensor) -> Tensor:
        """The layer's keys and values in row order, [rows, 2, kv_heads, head_dim] on the CPU.

        Either `out`, filled, or memory of the source's own (pinned beside a GPU) that stays as it is.
        """
        ...


class LayerWork(Protocol):
    """What the model does in a layer. Called on the caller's stream, layer after layer."""

    def recompute(self, layer: int) -> Tensor:
        """Fresh K/V of the selected rows, [selected, 2, kv_heads, head_dim]; needs no cached KV of this layer."""
        ...

    def fuse(self, layer: int, fresh: Tensor, cached: Tensor) -> Tensor:
        """The rows to write, from the fresh and the cached ones of the selected rows (WCA's fusion)."""
        ...

    def attend(self, layer: int, kv: Tensor, slots: Tensor) -> None:
        """Attention and the rest of the layer over kv [all slots, 2, kv_heads, head_dim], row i at slots[i]."""
        ...


@dataclass
class PagedKV:
    """A request's place in a paged KV cache.

    Attributes
    ----------
    kv : Tensor [layers, slots, 2, kv_heads, head_dim]
    slots : Tensor [layers, rows], int64, on the device of `kv`
        Where each reused row sits in each layer; "relocate" repoints it.
    spare : Tensor [n], int64
        Free slots, for relocated rows; at least as many as rows are selected.
    vacated : dict of int to Tensor
        Per layer, the slots that relocation left: decode fills these first.
    """

    kv: Tensor
    slots: Tensor
    spare: Tensor
    vacated: dict[int, Tensor] = field(default_factory=dict)

    def free_slots(self, layer: int) -> Tensor:
        """Slots for decoded tokens of a layer: vacated ones first, then the spare ones that were not used."""
        gone = self.vacated.get(layer)
        if gone is None:
            return self.spare
        return torch.cat((gone, self.spare[len(gone) :]))


@dataclass
class RunReport:
    """Seconds a layer from its start to the end of its attention, seconds spent waiting for loads, rows relocated."""

    order: str
    layer_s: list[float] = field(default_factory=list)
    wait_s: float = 0.0
    relocated: int = 0


class _Loaded:
    """One layer on its way in: host buffer, cached selected rows on the device, and the end of the load."""

    def __init__(self) -> None:
        self.first: Tensor | None = None
        self.first_ready = threading.Event()
        self.done: Future | None = None
        self.mark: torch.cuda.Event | None = None
        self.first_mark: torch.cuda.Event | None = None


class LoadWrite:
    """Runs layers in one of the orders.

    Parameters
    ----------
    order : str
        "locked", "relocate" or "disjoint".
    staging : int
        Layers read ahead, each with a buffer of its own.
    workers : int
        Threads that read.
    """

    def __init__(self, order: str, staging: int = 2, workers: int = 2) -> None:
        if order not in ORDERS:
            raise ConfigError(f"unknown load-write order {order!r}: choose {', '.join(ORDERS)}")
        if staging < 1 or workers < 1:
            raise ConfigError("staging and workers must be at least 1")
        self.order, self.staging, self.workers = order, staging, workers

    def run(self, source: LayerSource, target: PagedKV, selected: Tensor, work: LayerWork, first: int = 0) -> RunReport:
        """Complete layers [first, layers) of `target`; `selected` int64 ascending indices of the corrected rows."""
        device, layers = target.kv.device, target.kv.shape[0]
        job = _Run(self, source, target, selected, device)
        report = RunReport(self.order)
        with ThreadPoolExecutor(self.workers, "cacheslide-layer") as pool:
            loads = {layer: job.start(pool, layer) for layer in range(first, min(first + self.staging, layers))}
            try:
                for layer in range(first, layers):
                    begun = time.perf_counter()
                    job.layer(layer, loads.pop(layer), work, report)
                    if layer + self.staging < layers:
                        loads[layer + self.staging] = job.start(pool, layer + self.staging)
                    if device.type == "cuda":
                        torch.cuda.current_stream(device).synchronize()
                    report.layer_s.append(time.perf_counter() - begun)
            finally:
                for left in loads.values():
                    left.done.cancel()
        return report


class _Run:
    """The state of one run."""

    def __init__(self, plan: LoadWrite, source: LayerSource, target: PagedKV, selected: Tensor, device) -> None:
        self.plan, self.source, self.target, self.device = plan, source, target, device
        self.cuda = device.type == "cuda"
        rows, shape = target.slots.shape[1], target.kv.shape[2:]
        mask = torch.ones(rows, dtype=torch.bool)
        self.selected_host, self.selected = selected.cpu(), selected.to(device)
        mask[self.selected_host] = False
        self.rest = mask.nonzero()[:, 0].to(device)
        self.home = target.slots.clone()  # where the loader puts rows, whatever is repointed meanwhile
        pin = {"pin_memory": True} if self.cuda else {}
        like = {"dtype": target.kv.dtype, **pin}
        chosen = 0 if plan.order == "locked" else len(selected)
        self.free = [
            (torch.empty((rows, *shape), **like), torch.empty((chosen, *shape), **like)) for _ in range(plan.staging)
        ]
        self.guard = threading.Condition()
        self.stream = torch.cuda.Stream(device) if self.cuda else None

    def start(self, pool: ThreadPoolExecutor, layer: int) -> _Loaded:
        """Begin to load a layer."""
        loaded = _Loaded()
        loaded.done = pool.submit(self._load, layer, loaded)
        return loaded

    def _load(self, layer: int, loaded: _Loaded) -> None:
        with self.guard:
            self.guard.wait_for(lambda: self.free)
            buffer, ahead = self.free.pop()
        try:
            held = self.source.read(layer, buffer)
            with torch.cuda.stream(self.stream) if self.cuda else nullcontext():
                if self.plan.order != "locked":
                    torch.index_select(held, 0, self.selected_host, out=ahead)
                    loaded.first = ahead.to(self.device, non_blocking=True, copy=True)
                    loaded.first_mark = self._mark()
                    loaded.first_ready.set()
                rows, slots = held.to(self.device, non_blocking=True), self.home[layer]
                if self.plan.order == "disjoint":
                    rows, slots = rows[self.rest], slots[self.rest]
                self.target.kv[layer].index_copy_(0, slots, rows)
                loaded.mark = self._mark()
            if loaded.mark is not None:
                loaded.mark.synchronize()
        finally:
            loaded.first_ready.set()
            with self.guard:
                self.free.append((buffer, ahead))
                self.guard.notify()

    def _mark(self):
        if not self.cuda:
            return None
        mark = torch.cuda.Event()
        mark.record(self.stream)
        return mark

    def layer(self, layer: int, loaded: _Loaded, work: LayerWork, report: RunReport) -> None:
        """One layer in the chosen order."""
        kv, slots = self.target.kv[layer], self.target.slots[layer]
        if self.plan.order == "locked":
            self._wait(loaded, report)
            fresh = work.recompute(layer)
            kv[slots[self.selected]] = work.fuse(layer, fresh, kv[slots[self.selected]])
        else:
            fresh = work.recompute(layer)
            fused = work.fuse(layer, fresh, self._first(loaded, report))
            if self.plan.order == "relocate" and not loaded.done.done():
                spare = self.target.spare[: len(self.selected)]
                self.target.vacated[layer] = slots[self.selected]
                slots[self.selected] = spare
                report.relocated += len(spare)
            kv[slots[self.selected]] = fused
            self._wait(loaded, report)
        work.attend(layer, kv, slots)

    def _first(self, loaded: _Loaded, report: RunReport) -> Tensor:
        """The cached selected rows, on the device."""
        begun = time.perf_counter()
        loaded.first_ready.wait()
        if loaded.first is None:
            loaded.done.result()  # raises what stopped the load
        if loaded.first_mark is not None:
            torch.cuda.current_stream(self.device).wait_event(loaded.first_mark)
            loaded.first.record_stream(torch.cuda.current_stream(self.device))
        report.wait_s += time.perf_counter() - begun
        return loaded.first

    @staticmethod
    def _wait(loaded: _Loaded, report: RunReport) -> None:
        """Until the layer is loaded; a failed load is raised here."""
        begun = time.perf_counter()
        loaded.done.result()
        report.wait_s += time.perf_counter() - begun
