"""The scheduler side: plans reuse and storage of each annotated request, and gives its receipt."""

from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.request import RequestStatus

from cacheslide.vllm.claims import Claims
from cacheslide.vllm.cope.slots import SlotRows
from cacheslide.vllm.geometry import Geometry
from cacheslide.vllm.guard import Faults
from cacheslide.vllm.options import ServerOptions
from cacheslide.vllm.protocol import StepPlan, WorkerReport
from cacheslide.vllm.receipt_channel import close_box, open_box
from cacheslide.vllm.scheduler import reasons
from cacheslide.vllm.scheduler.history import retain_history
from cacheslide.vllm.scheduler.load_plans import computed_rows, load_plan
from cacheslide.vllm.scheduler.metrics import ReuseStats
from cacheslide.vllm.scheduler.packing import Packing, computed_tokens
from cacheslide.vllm.scheduler.planner import Planner
from cacheslide.vllm.scheduler.prefix_cache import key_apart, shares_unfilled_blocks
from cacheslide.vllm.scheduler.receipts import forecast, tiers_of
from cacheslide.vllm.scheduler.request_state import Tracked
from cacheslide.vllm.scheduler.retention import ChunkRetention
from cacheslide.vllm.scheduler.setbacks import cannot, give_up
from cacheslide.vllm.scheduler.storage import StorageTierView


class SchedulerSide:
    """Tracks requests and plans steps of the engine described by `vllm_config` and `geometry`."""

    def __init__(self, vllm_config, options: ServerOptions, geometry: Geometry) -> None:
        self.options, self.planner = options, Planner(options, geometry)
        self.block_size = vllm_config.cache_config.block_size
        self.engine_id = vllm_config.kv_transfer_config.engine_id
        self.box = open_box(self.engine_id)
        self.retention = ChunkRetention(options, geometry)
        self.index, self.storage_tier = self.retention.index, None
        if (tiers := options.tiers) is not None:
            ranks = vllm_config.parallel_config.tensor_parallel_size
            self.storage_tier = self.retention.storage_tier = StorageTierView(
                tiers, options.namespace, ranks, self.index, geometry
            )
        self.tracked: dict[str, Tracked] = {}
        self.running: dict[str, Any] = {}  # vLLM's requests with blocks, annotated or not
        self.prefilling: dict[str, None] = {}  # tracked requests with an incomplete prompt, by arrival
        self.stats, self.faults = ReuseStats(), Faults()
        self.claims = Claims(self.block_size)
        self.packing = Packing(options)  # the loads of the step being scheduled
        self.forget = False
        self.workers_wait = False  # workers have work for an idle step
        self.off = ""  # why reuse is off, "" if it is on

    # --- a request's way -------------------------------------------------------------------------------------------

    def arrive(self, request) -> None:
        """Track a request that may reuse chunks; starts the look-up of its chunks in the storage tier."""
        tracked = self.planner.plan(request)
        if tracked is None:
            return
        if self.off:
            give_up(self, request, self.off)
            return
        self.tracked[request.request_id] = tracked
        self.prefilling[request.request_id] = None
        if self.storage_tier is not None and not tracked.reason:
            try:
                self.storage_tier.look(tracked, tracked.plan.keys)
            except Exception as error:
                self.faults.note("look_up", error)
        if tracked.slots is not None:  # rows behind the first slot differ from those of a plain request
            secret = tracked.family.secret if tracked.family is not None else None
            key_apart(request, tracked.slots.bounds[0][1] // self.block_size, secret)

    def claim(self, request, computed: int) -> int | None:
        """Rows beyond the `computed` ones to complete by reuse; None to be asked again in a later step."""
        tracked = self.tracked.get(request.request_id)
        if tracked is None or tracked.reason not in reasons.RETRY:
            # A request that has started before continues at once: waiting requests are all later ones.
            return None if self.packing.full and request.status != RequestStatus.PREEMPTED else 0
        if self.off:
            give_up(self, request, self.off)
            return 0
        rows = self._claim(request, tracked, computed)
        if rows is not None:
            self.release(tracked)
        return rows

    def _claim(self, request, tracked: Tracked, computed: int) -> int | None:
        limit = tracked.rows - max(1, self.options.suffix_len)
        wanted = [
            (key, chunk) for key, chunk in tracked.plan.keyed if max(chunk.start, computed) < min(chunk.end, limit)
        ]
        if self._waits(tracked, wanted):
            return None
        self.index.touch(tracked.plan.keys)  # also while it waits
        if self.packing.full:
            return None
        reuse = tuple((key, chunk) for key, chunk in wanted if key in self.index)
        tracked.start, tracked.reuse = computed, reuse
        # Text behind the last reused row is exact work over complete KV: vLLM computes it together with the last row,
        # for
        # which it reads all weights anyway.
        want = min(limit, max((chunk.end for _, chunk in reuse), default=tracked.rows)) - computed
        if want <= 0 or not reuse:
            stored = any(key in self.index for key in tracked.plan.keys)
            tracked.reason = reasons.NOT_STORED_BEYOND if stored else reasons.NOT_STORED
            if want <= 0:
                tracked.reason = reasons.COVERED
            if tracked.follows and tracked.rows - computed < self.block_size:
                tracked.reason = ""  # the rest is exact work over the family's rows
            elif tracked.family is not None:
                tracked.family.reason = tracked.reason
            return 0
        if tracked.follows and want < self.block_size:  # a block that the first member left incomplete
            tracked.reuse = ()
            return 0
        if shares_unfilled_blocks(request, computed // self.block_size, self.running.values(), self.block_size):
            return None
        if not self.packing.takes(want, self._computed(tracked, want, limit)):
            return None
        tracked.reason = ""
        tracked.generation = max(self.index.generation(key) for key, _ in reuse)
        first, secret = computed // self.block_size, None
        if tracked.family is not None:
            tracked.family.corrected_from(first)
            secret = tracked.family.secret
        key_apart(request, first, secret)
        return want

    def _computed(self, tracked: Tracked, rows: int, limit: int) -> int:
        """Rows to compute if `rows` behind the request's start are completed by reuse."""
        load, layers = range(tracked.start, tracked.start + rows), self.planner.geometry.num_layers
        return computed_tokens(tracked.policy.correction, tracked.reuse, load, limit, layers)

    def _waits(self, tracked: Tracked, wanted) -> bool:
        """Whether to wait for chunks in storage; after a storage fault only chunks in memory are used."""
        if self.storage_tier is None or tracked.storage.faulty:
            return False
        try:
            return self.storage_tier.waits(tracked, wanted)
        except Exception as error:
            tracked.storage.faulty = True
            self.faults.note("look_up", error)
            return False

    def release(self, tracked: Tracked) -> None:
        """Release storage waits: the chunks are loaded in this step, or not needed."""
        if self.storage_tier is not None:
            self.storage_tier.release(tracked)

    def allocated(self, request, external: int) -> None:
        """vLLM gave the request blocks; `external` of its rows are completed by reuse."""
        self.running[request.request_id] = request
        tracked = self.tracked.get(request.request_id)
        if tracked is not None:
            tracked.loading = external > 0
            self.prefilling[request.request_id] = None  # added again after a preemption

    def finish(self, request, block_ids: Sequence[int] = ()) -> dict[str, Any] | None:
        """Remove the request, whose rows lie in `block_ids`; returns its receipt, None without annotations."""
        tracked, measured = self.forget_request(request.request_id)
        if tracked is None:
            return None
        self.release(tracked)
        receipt = measured or tracked.receipt or forecast(tracked)
        receipt |= {"generation": 0 if tracked.exact else tracked.generation}
        receipt |= {"tiers": tiers_of(tracked, receipt, self.planner.geometry, self.options.store_device)}
        receipt |= {"store_failures": tracked.storage.failures} if tracked.storage.failures else {}
        receipt |= {"note": tracked.note} if tracked.note else {}
        if tracked.history is not None and tracked.plan is not None:
            retained = self._survive("retain", retain_history, self.retention, request, tracked, list(block_ids))
            receipt |= {"history": retained}
        if tracked.last and tracked.plan is not None:
            self._survive("retain", self.retention.release, tracked.plan)
        # A family counts as one request while its blocks last.
        if not tracked.follows or tracked.reuse or tracked.reason not in ("", reasons.AS_FAMILY):
            self.stats.record(receipt)
        return receipt

    def forget_request(self, req_id: str) -> tuple[Tracked | None, dict[str, Any] | None]:
        """Remove a request; returns its tracked state and the receipt left by a worker."""
        self.running.pop(req_id, None)
        self.prefilling.pop(req_id, None)
        self.claims.forget(req_id)
        return self.tracked.pop(req_id, None), self.box.pop(req_id, None)

    # --- a step's plan ---------------------------------------------------------------------------------------------

    def step(self, output, step: StepPlan | None = None) -> StepPlan:
        """The workers' plan for the step described by `output`; fills `step` if given."""
        step = StepPlan() if step is None else step
        step.forget, self.forget = self.forget, False
        self.packing.begin()
        step.history_saves, self.retention.history_saves = self.retention.history_saves, []
        step.released, self.retention.released = self.retention.released, []
        step.idle = not output.num_scheduled_tokens
        self.workers_wait &= not step.idle  # workers report again if this step was not enough
        for req_id in [r for r in self.prefilling if r in output.num_scheduled_tokens]:
            try:
                self._plan(req_id, output, step)
            except Exception as error:
                self.faults.note("build_connector_meta", error)
                cannot(self, req_id, step)
        try:
            self.retention.hand_out(step, step.idle)
        except Exception as error:
            self.faults.note("retain", error)
            self.retention.drop_work()
        if self.storage_tier is not None:
            step.fetches, step.drops = self.storage_tier.take()
        return step

    def _survive(self, entry: str, does: Callable[..., Any], *args: Any) -> Any:
        """The result of `does`; after a fault None, and the index is marked for comparison with the workers."""
        try:
            return does(*args)
        except Exception as error:
            self.retention.unsettled = True
            self.faults.note(entry, error)
            return None

    def settle(self, output, step: StepPlan) -> None:
        """Complete a plan: unplanned claims have failed; an unsettled index is attached."""
        self.claims.settle(step, output)
        if self.retention.unsettled:
            step.index = {key: key in self.index for key in self.index.keys()}  # noqa: SIM118
            self.retention.unsettled = False

    def _plan(self, req_id: str, output, step: StepPlan) -> None:
        """Plan one request's part of a step that computes rows of its prompt."""
        tracked, state = self.tracked[req_id], output.kv_connector_block_state
        if state is not None and req_id in state.block_ids:
            tracked.block_ids = list(state.block_ids[req_id][0])
        computed = computed_rows(output, req_id)
        if tracked.loading:
            tracked.loading, tracked.exact, tracked.receipt = False, False, None
            step.loads.append(load_plan(req_id, tracked, computed, self.options.suffix_len))
        end = computed + output.num_scheduled_tokens[req_id]
        if tracked.slots is not None:
            step.slots.append(SlotRows(tuple(tracked.block_ids), computed, end, tracked.slots))
        if end >= tracked.rows:
            del self.prefilling[req_id]
            if not tracked.retained:
                tracked.retained = True
                self._survive("retain", self.retention.retain, tracked, step)

    # --- reports ---------------------------------------------------------------------------------------------------

    def on_worker_report(self, report: WorkerReport) -> None:
        """Take a step's receipts, and remove missing chunks from the index."""
        for req_id, receipt in report.receipts.items():
            if req_id in self.tracked:
                self.tracked[req_id].receipt = receipt
            self.box.pop(req_id, None)
        self.retention.unsettled |= report.unsettled
        self.workers_wait |= report.wants_idle
        for key in report.missing:
            self.index.discard(key)
            self.retention.unsettled = True  # other ranks may hold it
        if self.storage_tier is not None:
            self._survive("look_up", self.storage_tier.on_worker_report, report)

    def take_stats(self) -> ReuseStats:
        """Counts since the last call."""
        stats, self.stats = self.stats, ReuseStats()
        stats.count(self.faults.take())
        stats.count(self.index.take_counts())
        return stats

    def reset(self) -> None:
        """Drop every chunk, here and in the workers (the weights have changed).

        The storage tier's chunks belong to the first weights, so the model gets a new name in keys.
        """
        self.forget, self.off = True, "reset_cache"
        self.retention.clear()
        if self.storage_tier is not None:
            self.storage_tier.forget()
            self.planner.rename_model()
        self.planner.clear()
        self.off = ""

    def close(self) -> None:
        """Close the receipt box and the storage tier."""
        close_box(self.engine_id)
        if self.storage_tier is not None:
            self.storage_tier.close()
