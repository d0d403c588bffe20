"""Static layers replayed from CUDA graphs: one launch from the host per layer instead of about fifteen.

A layer's qkv, write, attention and finish are captured once per size (`graph_rows.py`), layer by layer. One graph of
all layers would save another thirty launches of ten microseconds, but cached rows could not arrive while it runs:
between two layers the loop places rows, and waits on the device for those in host memory, as without graphs. It also
lets a rule with a selection layer replay the layers behind it.

Capturing takes as long as a run or two, and many sizes never recur: a size is captured when the engine is idle, or at
its second use. Runs that cannot be replayed run as in `StaticPrefill` and are counted by reason; so does a run whose
capture or replay fails, from its first static layer on, since launched layers rewrite all that replays have written.

The attention takes part through the methods of `attention.RowKernel`; this module does not depend on its class.
"""

import gc
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from cacheslide.core.active_tokens import ActiveTokens
from cacheslide.core.static_prefill import StaticPrefill, packed, place
from cacheslide.models.adapter import RowGroup
from cacheslide.vllm.guard import Faults
from cacheslide.vllm.worker.attention import RowKernel
from cacheslide.vllm.worker.graph_rows import Size, StaticRows, size_for
from cacheslide.vllm.worker.kv_layout import addresses, in_one_cache

logger = logging.getLogger("vllm.cacheslide")
ENTRY = "graphs"
RECORD_AT = 2  # uses of a size until it is captured
MOST_SIZES = 64
Step = Callable[[], None]


class Recorder(Protocol):
    """Captures work for replay."""

    def record(self, step: Step) -> Step:
        """A callable that repeats on the device what `step` does, over the same memory; `step` may not run now."""
        ...

    def settle(self) -> None:
        """Wait until no captured work is running."""
        ...

    def free(self) -> int:
        """Free bytes of device memory."""
        ...


class CudaRecorder:
    """CUDA graphs over one memory pool, which they use one after the other.

    The pool is not vLLM's, whose graphs' outputs may still be read while these run. Its memory comes on top of vLLM's
    budget (docs/vllm.md, "Known limits").
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.stream, self.pool = device, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        with torch.cuda.stream(self.stream):  # allocates the matrix library's workspace of this stream outside the pool
            square = torch.zeros(16, 16, dtype=dtype, device=device)
            torch.mm(square, square)

    def record(self, step: Step) -> Step:
        """See `Recorder`."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        collects = gc.isenabled()
        gc.disable()  # garbage collection may call what a capture forbids
        try:
            with torch.cuda.stream(self.stream):
                # Other threads copy chunks and pin memory meanwhile, which is allowed only if the capture is of this
                # thread.
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    step()
                except BaseException:
                    with suppress(RuntimeError):  # a failed capture also fails to end
                        graph.capture_end()
                    raise
                graph.capture_end()
        finally:
            if collects:
                gc.enable()
        current.wait_stream(self.stream)
        return graph.replay

    def settle(self) -> None:
        """See `Recorder`."""
        torch.cuda.synchronize(self.device)

    def free(self) -> int:
        """See `Recorder`."""
        return torch.cuda.mem_get_info(self.device)[0]


class LayerGraphs:
    """The captured layers of a model over rows of one size.

    Parameters
    ----------
    model : VllmModel
    rows : StaticRows
        Tensors of this size. Their contents are overwritten.
    """

    def __init__(self, model, rows: StaticRows, recorder: Recorder) -> None:
        self.model, self.rows = model, rows
        self.attend = model.attend_paged.launch(rows.rows, rows.cu_rows, rows.table, model.scale, rows.extras)
        rows.clear()
        for layer in range(model.num_layers):  # compiles kernels and makes what a layer allocates at its first run
            self._step(layer)
        self._replays = [recorder.record(partial(self._step, layer)) for layer in range(model.num_layers)]

    def replay(self, layer: int) -> None:
        """Run a layer on the device over `rows`."""
        self._replays[layer]()

    def _step(self, layer: int) -> None:
        model, rows = self.model, self.rows
        q, k, v = model.qkv(layer, rows.hidden, rows.positions)
        paged = model.paged[layer]
        paged.write(rows.slots, k, v)
        hidden = model.finish(layer, rows.hidden, self.attend(layer, q, paged.cache, rows.attended))
        if hidden.data_ptr() != rows.hidden.data_ptr():
            rows.hidden.copy_(hidden)


class GraphedPrefill(StaticPrefill):
    """`StaticPrefill` that replays layers where possible.

    Parameters
    ----------
    model : VllmModel
        With caches in the open layout.
    max_tokens : int
        Maximum tokens of a prompt and its answer.
    make_recorder : callable, optional
        Returns the `Recorder`; CUDA graphs by default.
    faults : Faults, optional
        Counts failed captures and replays.

    Attributes
    ----------
    enabled : bool
    replayed : int
        Number of replayed runs.
    eager : Counter of str
        Number of runs not replayed, by reason.
    nbytes : int
        Device bytes taken by captures so far, including buffers and compiled kernels.
    """

    def __init__(
        self,
        model,
        max_tokens: int,
        make_recorder: Callable[[], Recorder] | None = None,
        faults: Faults | None = None,
    ) -> None:
        super().__init__(model)
        self.faults = faults or Faults()
        self.make_recorder = make_recorder or partial(CudaRecorder, model.device, model.dtype)
        self.most_blocks = -(-max_tokens // model.paged[0].block_size) + 1  # the next token may have a block already
        self.enabled, self.replayed, self.eager = True, 0, Counter()
        self.buffers: StaticRows | None = None
        self.recorder: Recorder | None = None
        self._empty()

    def _empty(self) -> None:
        self.recorded: dict[Size, LayerGraphs] = {}
        self.waiting: dict[Size, None] = {}  # sizes used and not captured, in order
        self.met, self.failed, self.nbytes = Counter(), set(), 0

    def _layers(self, states: Sequence[ActiveTokens], hidden: Tensor, first: int) -> Tensor:
        groups = [s.group for s in states]
        try:
            graphs = self._graphs(groups, len(hidden))
        except Exception as error:  # the run itself continues without graphs
            self.faults.note(ENTRY, error)
            graphs = "fault"
        if isinstance(graphs, str):
            self.eager[graphs] += 1
            return super()._layers(states, hidden, first)
        rows = graphs.rows
        works = self._tried(rows.fill, hidden, packed([s.active_positions for s in states]), groups)
        for layer in range(first, self.model.num_layers) if works else ():
            place(states, layer)  # errors here are the run's: it cannot continue with a failed source
            if not (works := self._tried(graphs.replay, layer)):
                break
        if not works:
            self.failed.add(rows.size)
            self.eager["fault"] += 1
            return super()._layers(states, hidden, first)
        self.replayed += 1
        return rows.hidden[: len(hidden)].clone()

    def _tried(self, does: Callable[..., None], *args: Any) -> bool:
        """Whether `does` succeeded; a failure is counted as a fault and disables replay."""
        try:
            does(*args)
        except Exception as error:
            self.faults.note(ENTRY, error)
            return False
        return True

    def _graphs(self, groups: Sequence[RowGroup], rows: int) -> LayerGraphs | str:
        """The graphs for a run, or the reason for having none."""
        if reason := self._unfit(groups):
            return reason
        blocks, variant = max(len(g.kv.table) for g in groups), self.model.attend_paged.variant(groups)
        size = size_for(rows, len(groups), blocks, self.most_blocks, variant)
        if size is None:
            return "size" if rows else "no rows"
        self._follow_caches()
        if size in self.failed:
            return "not recorded"
        if size in self.recorded:
            return self.recorded[size]
        self.met[size] += 1
        if len(self.recorded) >= MOST_SIZES:
            return "too many sizes"
        if self.met[size] < RECORD_AT:
            self.waiting[size] = None
            return "first of its size"
        return self._record(size)

    def record_waiting(self, idle: bool) -> bool:
        """At the end of a step, capture a waiting size if the step is `idle`; returns whether more are waiting.

        One per step, since a request may arrive at any moment.
        """
        if idle:
            self._follow_caches()
            with self.model.running():
                for size in list(self.waiting)[:1]:
                    self._record(size)
        return bool(self.waiting)

    def _follow_caches(self) -> None:
        """Drop what was captured over caches that vLLM has moved."""
        if self.recorded and addresses(self.model.paged) != self._at:
            self.forget()

    def _unfit(self, groups: Sequence[RowGroup]) -> str | None:
        model = self.model
        if not self.enabled:
            return "switched off"
        if model.ranks > 1:  # a rank that fails inside a run must know how many of its sums are done
            return "tensor parallelism"
        if not isinstance(model.attend_paged, RowKernel):
            return "attention"
        if model.schema_positions:
            return "schema positions"
        if any(g.narrow is not None for g in groups):
            return "narrow attention"
        if not in_one_cache(groups) or groups[0].kv.layers is not model.paged:
            return "scratch"
        return model.attend_paged.unfit(groups)

    def _record(self, size: Size) -> LayerGraphs | str:
        model, started = self.model, time.perf_counter()
        self.waiting.pop(size, None)
        try:
            if self.recorder is None:
                self.recorder = self.make_recorder()
            free = self.recorder.free()
            if self.buffers is None:
                self.buffers = StaticRows.make(model, self.most_blocks)
            self._at = addresses(model.paged)
            recorded = LayerGraphs(model, self.buffers.at(size), self.recorder)
            self.nbytes += max(0, free - self.recorder.free())
        except Exception as error:
            self.failed.add(size)
            self.faults.note(ENTRY, error)
            return "not recorded"
        self.recorded[size] = recorded
        took, mib = 1e3 * (time.perf_counter() - started), self.nbytes / 2**20
        logger.info("CacheSlide: recorded layers of %s in %.0f ms; all sizes hold %.0f MiB", size, took, mib)
        return recorded

    def forget(self) -> None:
        """Release all captures: the memory or weights they were made over have changed."""
        try:
            if self.recorder is not None:
                self.recorder.settle()
        finally:  # nothing may be replayed, even if the wait failed
            self._empty()
            self.recorder = None
