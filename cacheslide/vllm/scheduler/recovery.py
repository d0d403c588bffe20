"""A load that failed: its request starts over, computed exactly by vLLM.

vLLM's own recovery (`kv_load_failure_policy`) fails such requests by default, and under async scheduling, where the
next step is under way already, its "recompute" ends the engine: a later step embeds the placeholder of a token that was
dropped. Preemption is made for that: the blocks are given back, output in flight is dropped, and the request comes back
as one that claims nothing.
"""

import time
from functools import wraps
from typing import Any

from cacheslide.vllm.scheduler.setbacks import give_up
from cacheslide.vllm.scheduler.side import SchedulerSide


def install() -> None:
    """Have vLLM's schedulers recover our loads that way (once a process); other connectors' stay theirs."""
    from vllm.v1.core.sched.scheduler import Scheduler

    plain = Scheduler._handle_invalid_blocks
    if hasattr(plain, "starts_over"):
        return

    @wraps(plain)
    def handle(self, invalid_block_ids: set[int], num_scheduled_tokens: dict[str, int]) -> set[str]:
        side = getattr(self.connector, "scheduler", None)
        if not isinstance(side, SchedulerSide):
            return plain(self, invalid_block_ids, num_scheduled_tokens)
        self.recompute_kv_load_failures = True  # else it ends the requests that it is told of
        return start_over(self, side, invalid_block_ids)

    handle.starts_over = True
    Scheduler._handle_invalid_blocks = handle


def start_over(scheduler: Any, side: SchedulerSide, invalid: set[int]) -> set[str]:
    """Preempt the requests of vLLM's `scheduler` whose rows lie in `invalid` blocks.

    Nobody finds these blocks by their hashes any more. Returns the requests whose sampled tokens of this step are void.
    """
    lost = set()
    for request in reversed(list(scheduler.running)):  # each comes back in front of the others
        (blocks,) = scheduler.kv_cache_manager.get_block_ids(request.request_id)
        first = next((i for i, block in enumerate(blocks) if block in invalid), None)
        if first is None:
            continue
        give_up(side, request, "start_load_kv")
        scheduler.kv_cache_manager.evict_blocks(set(blocks[first:]))
        scheduler.running.remove(request)
        scheduler._preempt_request(request, time.monotonic(), drop_stale_output=True)
        scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
        lost.add(request.request_id)
    for request in side.claims.lost(invalid):
        if request.request_id in lost or request.is_finished():
            continue
        # Preempted while the step was under way: what it sampled from these rows is not to be delivered.
        give_up(side, request, "start_load_kv")
        scheduler.kv_cache_manager.evict_blocks(set(side.claims.blocks[request.request_id][1]))
        request.drop_stale_output = True
        lost.add(request.request_id)
    return lost
