"""The parts of a receipt that no worker measures."""

from collections.abc import Mapping
from typing import Any

from cacheslide.core.receipt import Receipt
from cacheslide.vllm.geometry import Geometry
from cacheslide.vllm.scheduler.reasons import MEMORY
from cacheslide.vllm.scheduler.request_state import Tracked


def forecast(tracked: Tracked) -> dict[str, Any]:
    """The receipt of a request computed exactly, or whose worker has not reported yet."""
    receipt = Receipt(tracked.system, tracked.rows, chunks=len(tracked.plan.chunks) if tracked.plan else 0)
    receipt.fallback = tracked.reason
    if not tracked.exact:
        receipt.chunks_hit = len(tracked.reuse)
    return receipt.as_dict() | {"tokens_prefix_cached": tracked.start, "measured": tracked.exact}


def bare(rows: int, why: str) -> dict[str, Any]:
    """The receipt of a request of which only its rows are known."""
    receipt = Receipt("", rows, fallback=why).as_dict()
    return receipt | {"tokens_prefix_cached": 0, "measured": False, "generation": 0, "tiers": {}}


def tiers_of(
    tracked: Tracked, receipt: Mapping[str, Any], geometry: Geometry, store_device: str
) -> dict[str, dict[str, int]]:
    """Chunks used and their bytes (per rank), by the tier that held them when the request arrived."""
    out: dict[str, dict[str, int]] = {}
    if not receipt["chunks_hit"]:
        return out
    probes, scores = len(tracked.policy.probe_layers), tracked.policy.needs_scores
    for key, chunk in tracked.reuse:
        in_memory = MEMORY[store_device], geometry.chunk_bytes(len(chunk), probes, scores)
        tier, nbytes = tracked.storage.tiers.get(key, in_memory)
        totals = out.setdefault(tier, {"chunks": 0, "bytes": 0})
        totals["chunks"] += 1
        totals["bytes"] += nbytes
    return out
