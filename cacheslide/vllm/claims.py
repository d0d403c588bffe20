"""Claimed rows that are not complete yet.

vLLM counts claimed rows as computed from the moment it gives them blocks, so claims are recorded before anything else
can fail. On the scheduler side every claim of a step is either loaded by its plan or listed in it as failed. A worker
counts every load as failed until its rows are complete, and reports the blocks of loads that did not complete.
"""

from collections.abc import Collection, Iterable
from typing import Any

from cacheslide.vllm.protocol import StepPlan


class Claims:
    """On the scheduler side: claims of the step being planned, and the blocks of loads whose outcome is unknown."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._owed: dict[str, tuple[Any, int]] = {}
        self.blocks: dict[str, tuple[Any, list[int]]] = {}  # request id -> (vLLM's request, blocks of its load)

    def allocated(self, request: Any, rows: int) -> None:
        """Record that vLLM gave `request` blocks; `rows` of it are to be completed by this step's load."""
        if rows > 0:
            self._owed[request.request_id] = request, rows

    def settle(self, step: StepPlan, output: Any) -> None:
        """Mark every claim for the step described by `output` that `step` does not load as failed."""
        owed, self._owed = self._owed, {}
        planned = {load.req_id for load in step.loads}
        held = getattr(output.kv_connector_block_state, "block_ids", None) or {}
        for req_id, (request, rows) in owed.items():
            if req_id not in held:
                continue
            end = request.num_computed_tokens
            blocks = list(held[req_id][0])[(end - rows) // self.block_size : -(-end // self.block_size)]
            self.blocks[req_id] = request, blocks
            if req_id not in planned:
                step.failed[req_id] = blocks

    def lost(self, invalid: Collection[int]) -> list[Any]:
        """vLLM's requests with a load into any of the `invalid` blocks."""
        return [request for request, blocks in self.blocks.values() if not invalid.isdisjoint(blocks)]

    def forget(self, req_id: str) -> None:
        """Drop a finished request."""
        self._owed.pop(req_id, None)
        self.blocks.pop(req_id, None)


class Loads:
    """On a worker: blocks with incomplete or wrong rows, by request."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.open: dict[str, list[int]] = {}
        self._step: dict[str, list[int]] = {}

    def begin(self, step: StepPlan) -> None:
        """Start a step: all of its loads are pending."""
        self.open = {req_id: list(blocks) for req_id, blocks in step.failed.items()}
        for plan in step.loads:
            blocks = plan.block_ids[plan.start // self.block_size : -(-plan.end // self.block_size)]
            self.open[plan.req_id] = self.open.get(plan.req_id, []) + blocks
        self._step = dict(self.open)

    def done(self, req_id: str) -> None:
        """The request's rows are complete."""
        self.open.pop(req_id, None)

    def spoil(self, req_id: str, blocks: Iterable[int]) -> None:
        """Rows in these blocks are wrong."""
        self.open[req_id] = self.open.get(req_id, []) + list(blocks)

    def errors(self) -> set[int]:
        """Blocks with load errors; each is returned once."""
        left, self.open = self.open, {}
        return {block for blocks in left.values() for block in blocks}

    def every(self) -> set[int]:
        """Blocks of all loads of the step, done or not."""
        return {block for blocks in (*self._step.values(), *self.open.values()) for block in blocks}
