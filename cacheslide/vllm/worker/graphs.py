"""Static layers replayed from CUDA graphs: a layer costs the host one launch instead of some fifteen.

A layer's qkv, write, attention and finish are recorded once for a size (`graph_rows.py`), layer by layer. One graph of
all layers would save thirty launches of ten microseconds more, but then cached rows could not arrive while it runs:
between two layers the loop goes on as ever, so that rows are placed, and those in host memory waited for on the device,
where they always were. It also lets a rule with a selection layer replay the layers behind it.

Recording takes as long as a run or two, and many a size never comes again: a size that was met is recorded when the
engine is idle, or when it is met for the second time. What cannot be replayed runs as `StaticPrefill` does, and is
counted by reason.
"""

import gc
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from cacheslide.core.active_tokens import ActiveTokens
from cacheslide.core.static_prefill import StaticPrefill, packed, place
from cacheslide.kernels import api as kernels
from cacheslide.vllm.worker.attention import RowKernel
from cacheslide.vllm.worker.graph_rows import Size, StaticRows, size_for
from cacheslide.vllm.worker.kv_layout import in_one_cache

logger = logging.getLogger("vllm.cacheslide")
RECORD_AT = 2  # times that a size is met before it is recorded
MOST_SIZES = 128
Step = Callable[[], None]


class Recorder(Protocol):
    """Makes work repeatable."""

    def record(self, step: Step) -> Step:
        """What does on the device what `step` would do, over the same memory. It may leave `step` undone now."""
        ...

    def settle(self) -> None:
        """Wait until nothing recorded is running."""
        ...

    def free(self) -> int:
        """Bytes of the device that nobody has taken."""
        ...


class CudaRecorder:
    """CUDA graphs over one pool of memory, which all of them use one after the other.

    The pool is not vLLM's: its graphs' outputs may still be read while ours run. What it takes comes on top of
    vLLM's budget (docs/vllm.md, "Known limits").
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.stream, self.pool = device, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        with torch.cuda.stream(self.stream):  # the matrix library's workspace of this stream lies outside of the pool
            square = torch.zeros(16, 16, dtype=dtype, device=device)
            torch.mm(square, square)

    def record(self, step: Step) -> Step:
        """See `Recorder`."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        collects = gc.isenabled()
        gc.disable()  # what a collection frees may call what a capture forbids
        try:
            with torch.cuda.stream(self.stream):
                # Other threads copy chunks and pin memory meanwhile, which only a capture of this thread allows.
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    step()
                except BaseException:
                    with suppress(RuntimeError):  # a capture that failed fails to end as well
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
    """The layers of a model over rows of one size, recorded.

    Parameters
    ----------
    model : VllmModel
    rows : StaticRows
        Of this size. Whatever is in there is lost.
    """

    def __init__(self, model, rows: StaticRows, recorder: Recorder) -> None:
        self.model, self.rows = model, rows
        self.attend = kernels.RowAttention(rows.rows, rows.cu_rows, rows.table, model.scale)
        rows.clear()
        for layer in range(model.num_layers):  # compiles kernels and makes what a layer makes at its first run
            self._step(layer)
        self.replay = [recorder.record(partial(self._step, layer)) for layer in range(model.num_layers)]

    def _step(self, layer: int) -> None:
        model, rows = self.model, self.rows
        q, k, v = model.qkv(layer, rows.hidden, rows.positions)
        paged = model.paged[layer]
        paged.write(rows.slots, k, v)
        hidden = model.finish(layer, rows.hidden, self.attend(q, paged.cache, rows.attended))
        if hidden.data_ptr() != rows.hidden.data_ptr():
            rows.hidden.copy_(hidden)


class GraphedPrefill(StaticPrefill):
    """`StaticPrefill` that replays layers where it can.

    Parameters
    ----------
    model : VllmModel
        Over caches of open layout.
    max_tokens : int
        Of a prompt and its answer.
    make_recorder : callable, optional
        Gives the `Recorder`; CUDA graphs by default.

    Attributes
    ----------
    enabled : bool
    replayed : int
        Runs that were replayed.
    eager : Counter of str
        Runs that were not, by reason.
    nbytes : int
        Bytes of the device that recording has taken so far, buffers and compiled kernels included.
    """

    def __init__(self, model, max_tokens: int, make_recorder: Callable[[], Recorder] | None = None) -> None:
        super().__init__(model)
        self.make_recorder = make_recorder or partial(CudaRecorder, model.device, model.dtype)
        self.most_blocks = -(-max_tokens // model.paged[0].block_size) + 1  # the next token's may be there already
        self.enabled, self.replayed, self.eager = True, 0, Counter()
        self.buffers: StaticRows | None = None
        self.recorder: Recorder | None = None
        self._empty()

    def _empty(self) -> None:
        self.recorded: dict[Size, LayerGraphs] = {}
        self.waiting: dict[Size, None] = {}  # met and not recorded, in that order
        self.met, self.failed, self.nbytes = Counter(), set(), 0

    def _layers(self, states: Sequence[ActiveTokens], hidden: Tensor, first: int) -> Tensor:
        graphs = self._graphs(states, len(hidden))
        if isinstance(graphs, str):
            self.eager[graphs] += 1
            return super()._layers(states, hidden, first)
        positions = packed([s.active_positions for s in states])
        graphs.rows.fill(hidden, positions, [s.group for s in states])
        for layer in range(first, self.model.num_layers):
            place(states, layer)
            graphs.replay[layer]()
        self.replayed += 1
        return graphs.rows.hidden[: len(hidden)].clone()

    def _graphs(self, states: Sequence[ActiveTokens], rows: int) -> LayerGraphs | str:
        """What a run replays, or why it does not."""
        if reason := self._unfit(states):
            return reason
        blocks = max(len(s.group.kv.table) for s in states)
        size = size_for(rows, len(states), blocks, self.most_blocks)
        if size is None:
            return "size" if rows else "no rows"
        if self.recorded and self.model.paged[0].cache.data_ptr() != self._at:
            self.forget()  # vLLM has moved its caches
        if size in self.recorded:
            return self.recorded[size]
        self.met[size] += 1
        if size in self.failed:
            return "not recorded"
        if len(self.recorded) >= MOST_SIZES:
            return "too many sizes"
        if self.met[size] < RECORD_AT:
            self.waiting[size] = None
            return "first of its size"
        return self._record(size)

    def record_waiting(self, idle: bool) -> bool:
        """At a step's end: record a size that waits, if the step is `idle`; whether more are waiting.

        One a step, since a request may come any moment.
        """
        if idle and self.waiting:
            with self.model.running():
                self._record(next(iter(self.waiting)))
        return bool(self.waiting)

    def _unfit(self, states: Sequence[ActiveTokens]) -> str | None:
        model, groups = self.model, [s.group for s in states]
        if not self.enabled:
            return "switched off"
        if model.ranks > 1:  # a rank that fails inside a run has to know how many of its sums are done
            return "tensor parallelism"
        if type(model.attend_paged) is not RowKernel:
            return "attention"
        if model.schema_positions:
            return "schema positions"
        if any(g.narrow is not None for g in groups):
            return "narrow attention"
        if not in_one_cache(groups) or groups[0].kv.layers is not model.paged:
            return "scratch"
        return None

    def _record(self, size: Size) -> LayerGraphs | str:
        model, started = self.model, time.perf_counter()
        self.waiting.pop(size, None)
        try:
            if self.recorder is None:
                self.recorder = self.make_recorder()
            free = self.recorder.free()
            if self.buffers is None:
                self.buffers = StaticRows.make(model, self.most_blocks)
            self._at = model.paged[0].cache.data_ptr()
            self.recorded[size] = LayerGraphs(model, self.buffers.at(size), self.recorder)
        except Exception:  # the run itself can do without
            logger.exception("CacheSlide: layers of %s were not recorded", size)
            self.failed.add(size)
            return "not recorded"
        self.nbytes += max(0, free - self.recorder.free())
        took, held = 1e3 * (time.perf_counter() - started), self.nbytes / 2**20
        logger.info("CacheSlide: recorded layers of %s in %.0f ms; all sizes hold %.0f MiB", size, took, held)
        return self.recorded[size]

    def forget(self) -> None:
        """Let go of everything recorded: what it was recorded over has changed."""
        if self.recorder is not None:
            self.recorder.settle()
        self._empty()
        self.recorder = None
