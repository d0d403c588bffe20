"""The KV connector vLLM talks to: hands every call to the half that lives in this process."""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from cacheslide.policy import check_policy
from cacheslide.vllm.door import is_installed
from cacheslide.vllm.geometry import Geometry
from cacheslide.vllm.metrics import ReuseMetrics, ReuseStats
from cacheslide.vllm.params import FIELD, ServerOptions
from cacheslide.vllm.scheduler_side import SchedulerSide
from cacheslide.vllm.support import check, check_place, check_spans
from cacheslide.vllm.worker_side import WorkerSide


class CacheSlideConnector(KVConnectorBase_V1, SupportsHMA):
    """Claims a prompt's rows up to the end of the last known chunk, and completes them before the step's forward."""

    def __init__(self, vllm_config, role: KVConnectorRole, kv_cache_config) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        check_place(vllm_config, is_installed())
        check(vllm_config, kv_cache_config)
        options = ServerOptions.from_extra_config(self._kv_transfer_config.kv_connector_extra_config)
        shared = options.tiers is not None and role == KVConnectorRole.SCHEDULER  # who names chunks
        geometry = Geometry.of(vllm_config, by_content=shared)
        check_policy(options.system, geometry.num_layers)
        check_spans(options.find_spans, geometry.slots)
        self.scheduler: SchedulerSide | None = None
        self.worker: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            self.scheduler = SchedulerSide(vllm_config, options, geometry)
        else:
            self.worker = WorkerSide(vllm_config, options)

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: what it drops is a later miss."""
        return False

    # --- scheduler -------------------------------------------------------------------------------------------------

    def on_new_request(self, request) -> None:
        self.scheduler.arrive(request)

    def get_num_new_matched_tokens(self, request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self.scheduler.claim(request, num_computed_tokens), False

    def update_state_after_alloc(self, request, blocks, num_external_tokens: int) -> None:
        self.scheduler.allocated(request, num_external_tokens)

    def build_connector_meta(self, scheduler_output) -> KVConnectorMetadata:
        return self.scheduler.step(scheduler_output)

    def update_connector_output(self, connector_output) -> None:
        if (report := connector_output.kv_connector_worker_meta) is not None:
            self.scheduler.heard(report)

    def request_finished_all_groups(self, request, block_ids) -> tuple[bool, dict[str, Any] | None]:
        receipt = self.scheduler.finish(request, list(block_ids[0]))
        return False, None if receipt is None else {FIELD: receipt}

    def has_pending_push_work(self) -> bool:
        """Keeps an idle engine stepping while chunks wait to be encoded or copied."""
        return bool(self.scheduler.keeper.jobs or self.scheduler.keeper.keeps)

    def get_kv_connector_stats(self) -> ReuseStats | None:
        return self.scheduler.take_stats() if self.scheduler is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> ReuseStats:
        return ReuseStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, vllm_config, metric_types, labelnames, per_engine_labelvalues) -> ReuseMetrics:
        return ReuseMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def reset_cache(self) -> bool:
        self.scheduler.reset()
        return True

    # --- worker ----------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches) -> None:
        self.worker.attach()

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        self.worker.begin(connector_metadata)  # the one hook that always comes before the forward

    def start_load_kv(self, forward_context, **kwargs: Any) -> None:
        self.worker.load(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Rows are complete before the forward starts."""

    def save_kv_layer(self, layer_name: str, kv_layer, attn_metadata, **kwargs: Any) -> None:
        """Chunks are copied after the forward."""

    def wait_for_save(self) -> None:
        self.worker.save(self._get_connector_metadata())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, None]:
        step = self._get_connector_metadata()  # the one hook that steps without a forward call too
        self.worker.encode(step)
        self.worker.land(step)
        return None, None

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self.worker.take_report()

    def shutdown(self) -> None:
        if self.scheduler is not None:
            self.scheduler.close()
        if self.worker is not None:
            self.worker.close()
