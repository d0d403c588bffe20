"""Fallbacks of the scheduler side for a request hit by a fault: vLLM computes it, and its state is removed."""

from typing import Any, Protocol

from cacheslide.vllm.guard import reason
from cacheslide.vllm.options import FIELD
from cacheslide.vllm.protocol import StepPlan
from cacheslide.vllm.scheduler.receipts import bare
from cacheslide.vllm.scheduler.request_state import Tracked


class Half(Protocol):
    """The part of `SchedulerSide` that is used here."""

    tracked: dict[str, Tracked]
    prefilling: dict[str, Any]
    box: dict[str, Any]
    retention: Any
    packing: Any
    block_size: int

    def release(self, tracked: Tracked) -> None:
        """Release the request's waits in storage."""
        ...

    def forget_request(self, req_id: str) -> tuple[Tracked | None, Any]:
        """Remove a request; returns its tracked state and its measured receipt, if any."""
        ...


def annotated(request: Any) -> bool:
    """Whether vLLM's `request` has annotations."""
    return (getattr(request, "kv_transfer_params", None) or {}).get(FIELD) is not None


def give_up(side: Half, request: Any, entry: str) -> None:
    """Have vLLM compute the request exactly from now on; its receipt names a fault at `entry`."""
    req_id = request.request_id
    tracked = side.tracked.get(req_id)
    side.box.pop(req_id, None)
    if tracked is None:
        if annotated(request):
            side.tracked[req_id] = Tracked(request.num_prompt_tokens, "", reason=reason(entry), retained=True)
        return
    tracked.reason, tracked.receipt, tracked.reuse, tracked.loading = reason(entry), None, (), False
    tracked.exact = not tracked.follows
    if tracked.slots is not None:  # live gates: the computed KV is not what its chunks' keys name
        tracked.slots, tracked.retained = None, True
    if tracked.family is not None:
        tracked.family.reason = tracked.reason
    side.release(tracked)


def check_claim(side: Half, request: Any, computed: int, rows: int | None) -> None:
    """Raise unless `rows` behind the `computed` ones may be claimed, whatever the request's plan.

    vLLM ends when a claim leaves it no row of the prompt, and rows of another prompt would give a wrong answer.
    """
    if not rows:
        return
    if rows < 0 or computed + rows >= request.num_prompt_tokens:
        raise ValueError(f"{computed} and {rows} rows claimed of a prompt of {request.num_prompt_tokens}")
    planned = side.tracked[request.request_id].plan.prompt.token_ids[: computed + rows]
    if list(planned) != list(request.prompt_token_ids[: computed + rows]):
        raise ValueError("the plan is that of another prompt")


def finish_anyhow(side: Half, request: Any) -> dict[str, Any] | None:
    """Fallback of `SchedulerSide.finish`: removes the request; a bare receipt if it has annotations."""
    tracked, _ = side.forget_request(request.request_id)
    if tracked is not None:
        side.release(tracked)
    if tracked is None and not annotated(request):
        return None
    return bare(request.num_prompt_tokens, reason("request_finished"))


def unplanned(side: Half, output: Any, step: StepPlan) -> None:
    """Planning `step` broke off: mark requests that need slots and are not in it as failed; others can wait."""
    side.packing.begin()
    side.retention.drop_work()
    done, state = {rows.block_ids for rows in step.slots}, output.kv_connector_block_state
    for req_id in [r for r in side.prefilling if r in output.num_scheduled_tokens]:
        tracked = side.tracked.get(req_id)
        if tracked is None or tracked.slots is None:
            continue
        if state is not None and req_id in state.block_ids:
            tracked.block_ids = list(state.block_ids[req_id][0])
        if tuple(tracked.block_ids) not in done:
            cannot(side, req_id, step)


def cannot(side: Half, req_id: str, step: StepPlan) -> None:
    """A request could not be planned: load nothing of it, and mark rows that cross slots as failed."""
    step.loads = [load for load in step.loads if load.req_id != req_id]
    side.prefilling.pop(req_id, None)
    tracked = side.tracked.get(req_id)
    if tracked is None:
        return
    tracked.loading, tracked.retained = False, True
    if tracked.slots is not None:
        step.failed[req_id] = tracked.block_ids[tracked.slots.bounds[0][1] // side.block_size :]
