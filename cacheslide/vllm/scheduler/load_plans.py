"""The load of one request in a step that vLLM has scheduled."""

from typing import Any

from cacheslide.vllm.protocol import LoadPlan
from cacheslide.vllm.scheduler.request_state import Tracked


def load_plan(req_id: str, tracked: Tracked, end: int, suffix_len: int) -> LoadPlan:
    """A load that completes the request's rows up to `end`; the last `suffix_len` prompt rows are recomputed."""
    plan, policy = tracked.plan, tracked.policy
    return LoadPlan(
        req_id,
        policy.name,
        plan,
        tracked.block_ids,
        tracked.start,
        end,
        tracked.rows - suffix_len,
        tracked.reuse,
        policy.placement,
        policy.correction,
        tracked.slots,
    )


def computed_rows(output: Any, req_id: str) -> int:
    """Rows of a scheduled request complete before this step, including rows completed by reuse."""
    for new in output.scheduled_new_reqs:
        if new.req_id == req_id:
            return new.num_computed_tokens
    cached = output.scheduled_cached_reqs
    return cached.num_computed_tokens[cached.req_ids.index(req_id)]
