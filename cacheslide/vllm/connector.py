"""The KV connector: passes vLLM's calls to the scheduler side or the worker side of this process."""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from cacheslide.renamed import receipt_for_all
from cacheslide.vllm.frontend.hooks import is_installed
from cacheslide.vllm.geometry import Geometry
from cacheslide.vllm.guard import survives
from cacheslide.vllm.options import FIELD, ServerOptions
from cacheslide.vllm.protocol import StepPlan
from cacheslide.vllm.scheduler import recovery
from cacheslide.vllm.scheduler.metrics import ReuseMetrics, ReuseStats
from cacheslide.vllm.scheduler.setbacks import check_claim, finish_anyhow, give_up, unplanned
from cacheslide.vllm.scheduler.side import SchedulerSide
from cacheslide.vllm.support import check, check_place, check_spans
from cacheslide.vllm.systems import check_served
from cacheslide.vllm.worker import early_start
from cacheslide.vllm.worker.side import WorkerSide


class CacheSlideConnector(KVConnectorBase_V1, SupportsHMA):
    """Claims a prompt's rows up to the end of the last known chunk, and completes them before the step's forward."""

    def __init__(self, vllm_config, role: KVConnectorRole, kv_cache_config) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        check_place(vllm_config, is_installed())
        check(vllm_config, kv_cache_config)
        options = ServerOptions.from_extra_config(self._kv_transfer_config.kv_connector_extra_config)
        shared = options.tiers is not None and role == KVConnectorRole.SCHEDULER  # the scheduler names chunks
        geometry = Geometry.of(vllm_config, by_content=shared)
        check_served(options.system, geometry.num_layers)
        check_spans(options.find_spans, geometry.slots)
        self.scheduler: SchedulerSide | None = None
        self.worker: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            self.scheduler = SchedulerSide(vllm_config, options, geometry)
            recovery.install()
        else:
            self.worker = WorkerSide(vllm_config, options)
            early_start.install()
        self.faults = (self.scheduler or self.worker).faults
        self._begun: StepPlan | None = None  # the step whose loads began before `start_load_kv`

    @property
    def requires_kv_delivery(self) -> bool:
        """False: this is a cache, and a dropped chunk is a later miss."""
        return False

    # --- scheduler -------------------------------------------------------------------------------------------------

    @survives("on_new_request", lambda self, request: give_up(self.scheduler, request, "on_new_request"))
    def on_new_request(self, request) -> None:
        self.scheduler.arrive(request)

    def _claim_nothing(self, request, num_computed_tokens: int) -> tuple[int, bool]:
        give_up(self.scheduler, request, "get_num_new_matched_tokens")
        return 0, False

    @survives("get_num_new_matched_tokens", _claim_nothing, last=(0, False))
    def get_num_new_matched_tokens(self, request, num_computed_tokens: int) -> tuple[int | None, bool]:
        rows = self.scheduler.claim(request, num_computed_tokens)
        check_claim(self.scheduler, request, num_computed_tokens, rows)
        return rows, False

    @survives("update_state_after_alloc")
    def update_state_after_alloc(self, request, blocks, num_external_tokens: int) -> None:
        self.scheduler.claims.allocated(request, num_external_tokens)  # before anything else can fail
        self.scheduler.allocated(request, num_external_tokens)

    def build_connector_meta(self, scheduler_output) -> KVConnectorMetadata:
        step = StepPlan()
        self._plan(scheduler_output, step)
        self._settle(scheduler_output, step)
        return step

    @survives("build_connector_meta", lambda self, *planned: unplanned(self.scheduler, *planned))
    def _plan(self, scheduler_output, step: StepPlan) -> None:
        self.scheduler.step(scheduler_output, step)

    @survives("build_connector_meta")
    def _settle(self, scheduler_output, step: StepPlan) -> None:
        self.scheduler.settle(scheduler_output, step)

    def _lost_worker_report(self, connector_output) -> None:
        self.scheduler.retention.unsettled = True

    @survives("update_connector_output", _lost_worker_report)
    def update_connector_output(self, connector_output) -> None:
        if (report := connector_output.kv_connector_worker_meta) is not None:
            self.scheduler.on_worker_report(report)

    def _finish_anyhow(self, request, block_ids) -> tuple[bool, dict[str, Any] | None]:
        receipt = finish_anyhow(self.scheduler, request)
        return False, None if receipt is None else {FIELD: receipt_for_all(receipt)}

    @survives("request_finished", _finish_anyhow, last=(False, None))
    def request_finished_all_groups(self, request, block_ids) -> tuple[bool, dict[str, Any] | None]:
        receipt = self.scheduler.finish(request, list(block_ids[0]))
        return False, None if receipt is None else {FIELD: receipt_for_all(receipt)}

    @survives("has_pending_push_work", last=False)
    def has_pending_push_work(self) -> bool:
        """Keeps an idle engine stepping while chunks wait to be encoded or copied, or layers to be captured."""
        return self.scheduler.retention.pending or self.scheduler.workers_wait

    @survives("get_kv_connector_stats")
    def get_kv_connector_stats(self) -> ReuseStats | None:
        if self.scheduler is not None:
            return self.scheduler.take_stats()
        return ReuseStats(data=counts) if (counts := self.faults.take()) else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> ReuseStats:
        return ReuseStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, vllm_config, metric_types, labelnames, per_engine_labelvalues) -> ReuseMetrics:
        return ReuseMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def _not_reset(self) -> bool:
        self.scheduler.forget, self.scheduler.off = True, "reset_cache"
        return False

    @survives("reset_cache", _not_reset, last=False)
    def reset_cache(self) -> bool:
        self.scheduler.reset()
        return True

    # --- worker ----------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches) -> None:
        """Called at start-up: an exception here stops the server, with its reason."""
        self.worker.attach()

    def begin_loads(self, step: StepPlan) -> None:
        """Do the work of `start_load_kv` earlier, before the step's inputs are ready (`worker/early_start.py`)."""
        self.bind_connector_metadata(step)
        self.start_load_kv(None)
        self._begun = step

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        if connector_metadata is self._begun:
            return
        self.worker.loads.begin(connector_metadata)  # before anything else can fail
        self._begin(connector_metadata)  # the only hook called in every step before the forward

    @survives("bind_connector_metadata", lambda self, step: self.worker.begin_nothing(step))
    def _begin(self, step: KVConnectorMetadata) -> None:
        self.worker.begin(step)

    def _load_nothing(self, forward_context, **kwargs: Any) -> None:
        self.worker.load_nothing(self._get_connector_metadata())

    @survives("start_load_kv", _load_nothing)
    def start_load_kv(self, forward_context, **kwargs: Any) -> None:
        step = self._get_connector_metadata()
        if step is not self._begun:
            self.worker.load(step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Does nothing: rows are complete before the forward starts."""

    def save_kv_layer(self, layer_name: str, kv_layer, attn_metadata, **kwargs: Any) -> None:
        """Does nothing: chunks are copied after the forward."""

    @survives("wait_for_save", lambda self: self.worker.save_nothing(self._get_connector_metadata()))
    def wait_for_save(self) -> None:
        self.worker.save(self._get_connector_metadata())

    @survives("get_finished", last=(None, None))
    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, None]:
        step = self._get_connector_metadata()  # also called in steps without a forward
        self._encode(step)
        self._on_loaded(step)
        return None, None

    @survives("encode", lambda self, step: self.worker.encode_nothing(step))
    def _encode(self, step: KVConnectorMetadata) -> None:
        self.worker.encode(step)

    @survives("on_loaded", lambda self, step: self.worker.on_none_loaded(step))
    def _on_loaded(self, step: KVConnectorMetadata) -> None:
        self.worker.on_loaded(step)
        self.worker.compare(step)

    def _all_errors(self) -> set[int]:
        return self.worker.loads.every()

    @survives("get_block_ids_with_load_errors", _all_errors, last=set())
    def get_block_ids_with_load_errors(self) -> set[int]:
        return self.worker.loads.errors()

    @survives("build_connector_worker_meta")
    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self.worker.take_report()

    @survives("shutdown")
    def shutdown(self) -> None:
        if self.scheduler is not None:
            self.scheduler.close()
        if self.worker is not None:
            self.worker.close()
