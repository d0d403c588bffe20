"""Rows that were claimed and that nobody has completed yet. Claims are recorded before anything else can fail.

vLLM takes claimed rows for computed from the moment it gives them blocks. The scheduler's half makes sure that every
claim of a step has a load in its plan or stands in it as failed; a worker holds every load for failed until its rows
are complete, and reports the blocks of the others.
"""

from collections.abc import Collection, Iterable
from typing import Any

from cacheslide.vllm.protocol import StepPlan


class Claims:
    """The scheduler's: what a step owes, and the blocks of loads whose outcome is not known yet."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._owed: dict[str, tuple[Any, int]] = {}
        self.blocks: dict[str, tuple[Any, list[int]]] = {}  # by request: vLLM's request, and the blocks of its load

    def allocated(self, request: Any, rows: int) -> None:
        """vLLM's `request` was given blocks; `rows` of it are ours to complete in the step being planned."""
        if rows > 0:
            self._owed[request.request_id] = request, rows

    def settle(self, step: StepPlan, output: Any) -> None:
        """Whatever was claimed for the step that `output` describes, and is not loaded in it, has failed."""
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
        """vLLM's requests with a load into one of the `invalid` blocks."""
        return [request for request, blocks in self.blocks.values() if not invalid.isdisjoint(blocks)]

    def forget(self, req_id: str) -> None:
        """The request has ended."""
        self._owed.pop(req_id, None)
        self.blocks.pop(req_id, None)


class Loads:
    """A worker's: blocks that are not to be trusted as things stand, by request."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.open: dict[str, list[int]] = {}
        self._step: dict[str, list[int]] = {}

    def begin(self, step: StepPlan) -> None:
        """A new step: its loads are all to be done."""
        self.open = {req_id: list(blocks) for req_id, blocks in step.failed.items()}
        for plan in step.loads:
            blocks = plan.block_ids[plan.start // self.block_size : -(-plan.end // self.block_size)]
            self.open[plan.req_id] = self.open.get(plan.req_id, []) + blocks
        self._step = dict(self.open)

    def done(self, req_id: str) -> None:
        """Its rows are complete."""
        self.open.pop(req_id, None)

    def spoil(self, req_id: str, blocks: Iterable[int]) -> None:
        """Rows in these blocks turned out wrong."""
        self.open[req_id] = self.open.get(req_id, []) + list(blocks)

    def errors(self) -> set[int]:
        """Blocks to report, once."""
        left, self.open = self.open, {}
        return {block for blocks in left.values() for block in blocks}

    def every(self) -> set[int]:
        """Those of all loads of the step, done or not."""
        return {block for blocks in (*self._step.values(), *self.open.values()) for block in blocks}
