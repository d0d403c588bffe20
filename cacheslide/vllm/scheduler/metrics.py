"""Counters of reuse for vLLM's log line and its Prometheus endpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import REGISTRY
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from cacheslide.renamed import RECEIPT
from cacheslide.vllm.guard import ENTRIES, SERVER, survives
from cacheslide.vllm.scheduler.reasons import FAILURES, KINDS, TIERS, failure_of, kind_of

COUNTERS = {
    "requests": "Annotated requests that finished",
    "tokens": "Prompt tokens of annotated requests",
    "tokens_reused": "Prompt tokens whose cached KV was used",
    "tokens_recomputed": "Prompt tokens with cached KV that was recomputed",
    "tokens_prefix_cached": "Prompt tokens of annotated requests found in vLLM's prefix cache",
    "chunks": "Chunks of annotated requests",
    "chunks_hit": "Chunks found in the store",
    "bytes_loaded": "Bytes of chunk KV read",
}
# The same counts under the names of the previous version, for existing dashboards.
OLD_COUNTERS = {old: new for old, new in RECEIPT.items() if new in COUNTERS}


STATES = ("clean", "dirty")  # of evicted chunks (`ChunkIndex`)
# Counters with one more label: its name, its values, and the counted quantity.
LABELLED = {
    "fallbacks": ("reason", KINDS, "Annotated requests computed exactly, in part or whole, by reason"),
    "store_chunks": ("tier", TIERS, "Chunks used, by the tier that had them when the request came"),
    "store_bytes": ("tier", TIERS, "Bytes of those chunks, of one rank"),
    "evictions": ("state", STATES, "Chunks that left memory for others, by whether that cost a write (dirty) or not"),
    "evicted_bytes": ("state", STATES, "Bytes of those chunks, of one rank"),
    "store_failures": ("reason", FAILURES, "Chunks computed again because a tier could not give them"),
    "faults": ("entry", tuple(ENTRIES), "Faults of the connector that were survived, by where they happened"),
}


@dataclass
class ReuseStats(KVConnectorStats):
    """Counts since the last report: the keys of `COUNTERS`, and `<name of LABELLED>.<label>`."""

    def record(self, receipt: Mapping[str, Any]) -> None:
        """Count one finished request."""
        counted = {"requests": 1} | {name: receipt[name] for name in COUNTERS if name != "requests"}
        counted |= {old: receipt[new] for old, new in OLD_COUNTERS.items()}
        if kind := kind_of(receipt["fallback"]):
            counted[f"fallbacks.{kind}"] = 1
        for tier, counts in receipt.get("tiers", {}).items():
            counted[f"store_chunks.{tier}"], counted[f"store_bytes.{tier}"] = counts["chunks"], counts["bytes"]
        self.count(counted)
        for why in receipt.get("store_failures", {}).values():
            self.count({f"store_failures.{failure_of(why)}": 1})

    def count(self, counts: Mapping[str, int]) -> None:
        """Add counts under these names."""
        for name, count in counts.items():
            self.data[name] = self.data.get(name, 0) + count

    def reset(self) -> None:
        """Reset all counts."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add another period's counts."""
        self.count(other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        """The counts that vLLM logs."""
        return dict(self.data)

    def is_empty(self) -> bool:
        """Whether there are no counts."""
        return not self.data


def _unregister() -> None:
    """Unregister counters of an earlier engine in this process, as vLLM does with its own."""
    for collector in list(REGISTRY._collector_to_names):
        if str(getattr(collector, "_name", "")).startswith("cacheslide:"):
            REGISTRY.unregister(collector)


class ReuseMetrics(KVConnectorPromMetrics):
    """`cacheslide:*` counters per engine."""

    def __init__(self, vllm_config, metric_types, labelnames, per_engine_labelvalues) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        _unregister()
        self.counters, self.faults = {}, SERVER
        old = {name: f"Old name of {new}" for name, new in OLD_COUNTERS.items()}
        for name, description in (COUNTERS | old).items():
            counter = self._counter_cls(name=f"cacheslide:{name}", documentation=description, labelnames=labelnames)
            for engine, labels in per_engine_labelvalues.items():
                self.counters[engine, name] = counter.labels(*labels)
        for name, (label, values, description) in LABELLED.items():
            names = [*labelnames, label]
            counter = self._counter_cls(name=f"cacheslide:{name}", documentation=description, labelnames=names)
            for engine, labels in per_engine_labelvalues.items():
                for value in values:
                    self.counters[engine, f"{name}.{value}"] = counter.labels(*labels, value)

    @survives("observe")
    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one report's counts."""
        for name, count in (*transfer_stats_data.items(), *SERVER.take().items()):
            if (counter := self.counters.get((engine_idx, name))) is not None:
                counter.inc(count)
