"""Places where a fault is injected into a running engine: every method that vLLM calls, and the seams below them.

A seam is `OWNER:NAME`. OWNER is a path from the connector's halves, `scheduler` and `worker`, or a module or class of
this package; NAME is the attribute that raises.
"""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# The functions to which the connector's guarded methods, called by vLLM, delegate.
ENTRY_SEAMS = {
    "on_new_request": ("scheduler:arrive",),
    "get_num_new_matched_tokens": ("scheduler:claim",),
    "update_state_after_alloc": ("scheduler:allocated",),
    "build_connector_meta": ("scheduler:step", "scheduler:settle"),
    "update_connector_output": ("scheduler:on_worker_report",),
    "request_finished": ("scheduler:finish",),
    "has_pending_push_work": ("cacheslide.vllm.scheduler.retention.ChunkRetention:pending",),
    "get_kv_connector_stats": ("scheduler:take_stats",),
    "reset_cache": ("scheduler:reset",),
    "bind_connector_metadata": ("worker:begin",),
    "start_load_kv": ("worker:load",),
    "wait_for_save": ("worker:save",),
    "encode": ("worker:encode",),
    "on_loaded": ("worker:on_loaded", "worker:compare"),
    "get_block_ids_with_load_errors": ("worker.loads:errors",),
    "build_connector_worker_meta": ("worker:take_report",),
}

_SCHEDULER = "cacheslide.vllm.scheduler.side"
_SCORING = "cacheslide.vllm.worker.scoring.Scorer"
_GRAPHS = "cacheslide.vllm.worker.graphs"
GRAPH_SEAMS = (  # layers are recorded on a GPU only
    f"{_GRAPHS}.GraphedPrefill:_graphs", f"{_GRAPHS}.GraphedPrefill:_record", f"{_GRAPHS}.LayerGraphs:_step",
    f"{_GRAPHS}.LayerGraphs:replay", "cacheslide.vllm.worker.graph_rows.StaticRows:at",
    "cacheslide.vllm.worker.graph_rows.StaticRows:fill", "cacheslide.vllm.worker.graph_rows.StaticRows:clear",
)  # fmt: skip
_LOADING = "cacheslide.vllm.worker.loading.Loading"
INNER_SEAMS = (
    # the scheduler's half
    "scheduler.planner:plan", "scheduler.planner:_member", "scheduler.planner.families:get",
    "cacheslide.vllm.scheduler.request_state.Family:join",
    "cacheslide.vllm.scheduler.request_state.Family:corrected_from",
    f"{_SCHEDULER}:key_apart", f"{_SCHEDULER}:shares_unfilled_blocks", f"{_SCHEDULER}:retain_history",
    f"{_SCHEDULER}:forecast", f"{_SCHEDULER}:tiers_of", f"{_SCHEDULER}:load_plan", f"{_SCHEDULER}:computed_rows",
    "scheduler.retention:retain", "scheduler.retention:reserve", "scheduler.retention:enqueue",
    "scheduler.retention:hand_out", "scheduler.packing:takes", f"{_SCHEDULER}:computed_tokens",
    "scheduler.index:reserve", "scheduler.index:touch", "scheduler.index:generation", "scheduler.index:discard",
    "scheduler.index:on_loaded", "scheduler.index:lease", "scheduler.index:release", "scheduler.index:has_room",
    "scheduler.storage_tier:look", "scheduler.storage_tier:waits", "scheduler.storage_tier:take",
    "scheduler.storage_tier:on_worker_report", "scheduler.storage_tier:evicted", "scheduler.storage_tier:release",
    "scheduler.storage_tier.persistent:where",
    "cacheslide.vllm.scheduler.metrics.ReuseStats:record",
    # the worker's half
    "worker.store:put", "worker.store:lend", "worker.store:drop", "worker.store:put_loaded", "worker.store:settle",
    "worker.storage_tier:fetch", "worker.storage_tier:arrivals", "worker.storage_tier:write",
    "worker.storage_tier:drop", "worker.storage_tier.store:fetch", "worker.storage_tier.store:put",
    "worker:_copy", "worker:_encode", "cacheslide.core.encoder.ChunkEncoder:encode",
    "cacheslide.core.encoder.ChunkEncoder:store_chunk",
    f"{_LOADING}:_one", f"{_LOADING}:_find", f"{_LOADING}:_prepare", f"{_LOADING}:_note",
    "cacheslide.vllm.worker.requests.PagedRequests:reserve", "cacheslide.vllm.worker.requests.PagedRequests:source",
    "cacheslide.vllm.worker.loading:post", "cacheslide.vllm.worker.ranks.TeamPrefill:compute",
    "cacheslide.vllm.worker.model_adapter.VllmModel:qkv", "cacheslide.vllm.worker.model_adapter.VllmModel:finish",
    "cacheslide.vllm.worker.kv_layout.PagedKV:write", "cacheslide.vllm.worker.kv_layout.PagedKV:read",
    "cacheslide.core.placement.PlacedChunks:layer",
    # remembered deviation of chunks
    f"{_SCORING}:run", f"{_SCORING}:skip", f"{_SCORING}:_held", f"{_SCORING}:_contrast", f"{_SCORING}:_score",
    f"{_SCORING}:_one", "cacheslide.core.remembering.Contrast:prepare", "cacheslide.core.remembering.Contrast:scores",
    "worker.store:rescore", "worker.store:await_no_more",
    *GRAPH_SEAMS,
)  # fmt: skip
SEAMS = tuple(seam for seams in ENTRY_SEAMS.values() for seam in seams) + INNER_SEAMS
# Once: the first call raises. Late: the first call raises after its work is done. Always: every call raises.
MODES = ("once", "late", "always")
ERRORS = (RuntimeError, KeyError, MemoryError, ValueError, OSError, AssertionError)


@dataclass
class Raised:
    """How often a seam was reached, and how often it raised."""

    calls: int = 0
    raised: int = 0


def owner_of(seam: str, parts: Mapping[str, Any]) -> tuple[Any, str]:
    """The object that owns a seam's attribute, and the attribute's name; `parts` are the connector's halves."""
    path, name = seam.split(":")
    first, *rest = path.split(".")
    if first in parts:
        owner = parts[first]
    else:
        module, last = path.rsplit(".", 1)
        rest = [last] if last[0].isupper() else []
        owner = importlib.import_module(module if rest else path)
    for step in rest:
        owner = getattr(owner, step)
    return owner, name


@contextmanager
def raising(seam: str, mode: str, error: type[Exception], parts: Mapping[str, Any], skip: int = 0) -> Iterator[Raised]:
    """Make a seam raise in one of `MODES` until the block ends; the first `skip` calls pass."""
    owner, name = owner_of(seam, parts)
    own, counts = vars(owner).get(name), Raised()
    plain = own if isinstance(own, property) else getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        counts.calls += 1
        now = counts.calls > skip and (mode == "always" or not counts.raised)
        if now and mode != "late":
            counts.raised += 1
            raise error(f"a fault at {seam}")
        does = plain.fget if isinstance(plain, property) else plain
        out = does(*args, **kwargs)
        if now:
            counts.raised += 1
            raise error(f"a late fault at {seam}")
        return out

    setattr(owner, name, property(call) if isinstance(plain, property) else call)
    try:
        yield counts
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
