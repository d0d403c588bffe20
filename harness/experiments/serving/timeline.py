"""Times of each part of a request on host and device, from wrapped methods of an in-process engine.

Times are milliseconds from the request's arrival in the engine. Wrapping costs a microsecond a call.
"""

import statistics
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from typing import Any

ARRIVAL = "request taken in"


@dataclass(frozen=True)
class Part:
    """A method whose calls are parts of a request; `device` also records begin and end of its work on the device.

    `owner` is "module:Class". A class that this installation lacks is left out.
    """

    label: str
    owner: str
    method: str
    device: bool = False


RUNNER = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
PARTS = (
    Part(ARRIVAL, "vllm.v1.engine.llm_engine:LLMEngine", "add_request"),
    Part("reuse planned", "cacheslide.vllm.scheduler.planner:Planner", "plan"),
    Part("step scheduled", "vllm.v1.core.sched.scheduler:Scheduler", "schedule"),
    Part("rows claimed", "cacheslide.vllm.connector:CacheSlideConnector", "get_num_new_matched_tokens"),
    Part("loads planned", "cacheslide.vllm.connector:CacheSlideConnector", "build_connector_meta"),
    Part("worker's step", "vllm.v1.worker.gpu_worker:Worker", "execute_model"),
    Part("load", "cacheslide.vllm.worker.side:WorkerSide", "load", device=True),
    Part("load: chunks lent", "cacheslide.vllm.worker.loading:Loading", "_lend"),
    Part("load: pieces found", "cacheslide.vllm.worker.loading:Loading", "_find"),
    Part("load: request built", "cacheslide.vllm.worker.loading:Loading", "_prepare"),
    Part("load: layers", "cacheslide.core.static_prefill:StaticPrefill", "run"),
    Part("load: buffers filled", "cacheslide.vllm.worker.graph_rows:StaticRows", "fill"),
    Part("runner: requests", RUNNER, "add_requests"),
    Part("runner: inputs", RUNNER, "prepare_inputs"),
    Part("runner: block tables", RUNNER, "prepare_attn"),
    Part("runner: attention metadata", "vllm.v1.worker.gpu.model_states.default:DefaultModelState", "prepare_attn"),
    Part("connector asked", "vllm.v1.worker.gpu.kv_connector:ActiveKVConnector", "pre_forward"),
    Part("forward launched", "vllm.v1.worker.gpu.cudagraph_utils:ModelCudaGraphManager", "run_pw_graph", device=True),
    Part("token sampled", RUNNER, "sample_tokens", device=True),
    Part("output taken", "vllm.v1.core.sched.scheduler:Scheduler", "update_from_output"),
    Part("answer made", "vllm.v1.engine.output_processor:OutputProcessor", "process_outputs"),
)


class Timeline:
    """Collects the calls of `parts` while it is entered."""

    def __init__(self, parts: Sequence[Part] = PARTS) -> None:
        self.parts, self.calls = parts, []
        self._origin: tuple[float, Any] | None = None

    @contextmanager
    def measuring(self):
        """Around one request: afterwards `calls` holds its calls, in milliseconds from its arrival."""
        self.calls = []
        with ExitStack() as stack:
            self._origin = _origin()
            for part in self.parts:
                if (owner := _class(part.owner)) is not None and hasattr(owner, part.method):
                    stack.enter_context(self._wrapped(owner, part))
            yield
            self._settle()

    @contextmanager
    def _wrapped(self, owner: type, part: Part):
        plain, own = getattr(owner, part.method), part.method in vars(owner)

        @wraps(plain)
        def call(*args: Any, **kwargs: Any) -> Any:
            record = {"label": part.label, "begin": time.perf_counter(), "events": []}
            self.calls.append(record)
            try:
                with _device_span(record["events"] if part.device and self._origin[1] is not None else None):
                    return plain(*args, **kwargs)
            finally:
                record["end"] = time.perf_counter()

        setattr(owner, part.method, call)
        try:
            yield
        finally:
            if own:
                setattr(owner, part.method, plain)
            else:
                delattr(owner, part.method)

    def _settle(self) -> None:
        """Turn clock readings and events into milliseconds from the arrival."""
        started, event = self._origin
        arrivals = [c["begin"] for c in self.calls if c["label"] == ARRIVAL]
        zero = min(arrivals, default=started)
        if event is not None:
            _synchronize()
        for call in self.calls:
            call["device"] = [event.elapsed_time(e) - 1e3 * (zero - started) for e in call.pop("events")]
            call["begin"], call["end"] = (1e3 * (call[x] - zero) for x in ("begin", "end"))


def medians(requests: Iterable[Sequence[dict]]) -> list[dict[str, Any]]:
    """One line a label over several requests' calls: medians in ms of the first call's begin, the time in all calls,
    their number and, if recorded, begin and end on the device; in order of begin."""
    requests = list(requests)
    lines = []
    for label in dict.fromkeys(c["label"] for calls in requests for c in calls):
        of_label = [[c for c in calls if c["label"] == label] for calls in requests]
        of_label = [calls for calls in of_label if calls]
        line = {
            "label": label,
            "begin_ms": _median(calls[0]["begin"] for calls in of_label),
            "host_ms": _median(sum(c["end"] - c["begin"] for c in calls) for calls in of_label),
            "calls": _median(len(calls) for calls in of_label),
        }
        if devices := [calls[0]["device"] for calls in of_label if calls[0]["device"]]:
            line |= {"device_begin_ms": _median(d[0] for d in devices), "device_end_ms": _median(d[1] for d in devices)}
        lines.append(line)
    return sorted(lines, key=lambda line: line["begin_ms"])


def _median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 3)


def _class(name: str) -> type | None:
    module, _, attribute = name.partition(":")
    try:
        return getattr(import_module(module), attribute, None)
    except ImportError:
        return None


def _origin() -> tuple[float, Any]:
    """A reading of the clock, and an event that ended on the device just then (None without a GPU)."""
    import torch

    if not torch.cuda.is_available():
        return time.perf_counter(), None
    event = torch.cuda.Event(enable_timing=True)
    _synchronize()
    event.record()
    event.synchronize()
    return time.perf_counter(), event


def _synchronize() -> None:
    import torch

    torch.cuda.synchronize()


@contextmanager
def _device_span(events: list | None):
    """CUDA events around the work launched inside."""
    if events is None:
        yield
        return
    import torch

    events.extend(torch.cuda.Event(enable_timing=True) for _ in range(2))
    events[0].record()
    yield
    events[1].record()
