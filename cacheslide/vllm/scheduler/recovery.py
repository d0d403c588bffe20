"""Recovery from a failed load: the request starts over and vLLM computes it exactly.

vLLM's own recovery (`kv_load_failure_policy`) fails such requests by default. Its "recompute" ends the engine under
async scheduling, where the next step has started already: a later step embeds the placeholder of a dropped token.
Preemption avoids this: it frees the blocks, drops output in flight, and the request returns and claims nothing.
"""

import time
from collections.abc import Collection
from functools import wraps
from typing import Any

from cacheslide.vllm.scheduler.setbacks import give_up
from cacheslide.vllm.scheduler.side import SchedulerSide


def install() -> None:
    """Install this recovery in vLLM's schedulers (once a process), for this connector's loads only."""
    from vllm.v1.core.sched.scheduler import Scheduler

    plain = Scheduler._handle_invalid_blocks
    if hasattr(plain, "starts_over"):
        return

    @wraps(plain)
    def handle(self, invalid_block_ids: set[int], num_scheduled_tokens: dict[str, int]) -> set[str]:
        side = getattr(self.connector, "scheduler", None)
        if not isinstance(side, SchedulerSide):
            return plain(self, invalid_block_ids, num_scheduled_tokens)
        self.recompute_kv_load_failures = True  # otherwise vLLM ends the affected requests
        return start_over(self, side, invalid_block_ids, num_scheduled_tokens)

    handle.starts_over = True
    Scheduler._handle_invalid_blocks = handle


def start_over(scheduler: Any, side: SchedulerSide, invalid: set[int], scheduled: Collection[str]) -> set[str]:
    """Preempt the requests of vLLM's `scheduler` with rows in `invalid` blocks.

    These blocks' hashes are removed. `scheduled` are the ids of the step's requests. Returns the ids of those whose
    tokens sampled in this step are void: vLLM drops them, so a request that keeps its rows must not be among them.
    """
    lost = set()
    for request in reversed(list(scheduler.running)):  # each is put at the head of the queue
        (blocks,) = scheduler.kv_cache_manager.get_block_ids(request.request_id)
        first = next((i for i, block in enumerate(blocks) if block in invalid), None)
        if first is None:
            continue
        give_up(side, request, "start_load_kv")
        side.claims.blocks.pop(request.request_id, None)  # another request may get these blocks
        scheduler.kv_cache_manager.evict_blocks(set(blocks[first:]))
        scheduler.running.remove(request)
        scheduler._preempt_request(request, time.monotonic(), drop_stale_output=True)
        scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
        lost.add(request.request_id)
    scheduler.kv_cache_manager.evict_blocks(set(invalid))
    running = {request.request_id for request in scheduler.running}
    for request in side.claims.lost(invalid):
        req_id = request.request_id
        if req_id in lost or req_id in running or req_id not in scheduled or request.is_finished():
            continue  # a running request has other blocks by now: these belong to another request's load
        # Preempted during the step: tokens sampled from these rows must not be delivered.
        give_up(side, request, "start_load_kv")
        _, blocks = side.claims.blocks.pop(req_id)
        scheduler.kv_cache_manager.evict_blocks(set(blocks))
        request.drop_stale_output = True
        lost.add(req_id)
    return lost
