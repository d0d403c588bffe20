"""Keeps exceptions out of vLLM: a fault of the connector is logged and counted, and costs only reuse.

An exception from a connector ends vLLM's engine and with it every other request. Each guarded method has a fallback;
what was promised and not done (claimed rows, chunks in the index) is repaired by `claims.py`, `recovery.py` and the
index's resynchronisation. Errors that make a GPU unusable are raised again.
"""

import logging
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from cacheslide.vllm.scheduler.reasons import FAULT

logger = logging.getLogger("vllm.cacheslide")

# Entries where a fault may happen, and what its consequence is.
ENTRIES = {
    "on_new_request": "the request is computed exactly",
    "look_up": "the chunk counts as not in a storage tier",
    "get_num_new_matched_tokens": "nothing is claimed: the request is computed exactly",
    "update_state_after_alloc": "rows that were claimed are reported as not loaded: vLLM computes them",
    "build_connector_meta": "what is planned so far is done; claimed rows without a plan are reported as not loaded",
    "retain": "chunks that wait to be retained are not",
    "update_connector_output": "the index is compared with what the workers hold",
    "request_finished": "the request is forgotten, its receipt says so",
    "has_pending_push_work": "an idle engine rests",
    "get_kv_connector_stats": "the counts come with the next report, or not at all",
    "reset_cache": "nothing is reused until a reset succeeds",
    "bind_connector_metadata": "the index is compared with what the workers hold",
    "start_load_kv": "rows are computed instead, by us or by vLLM",
    "graphs": "layers are launched instead of replayed",
    "wait_for_save": "the chunk is not retained, and leaves the index",
    "encode": "the chunk is not retained, and leaves the index",
    "score": "the chunk stays without scores",
    "on_loaded": "the chunk is computed instead",
    "get_finished": "the next step does it",
    "get_block_ids_with_load_errors": "every row that was to be loaded in this step is computed by vLLM",
    "build_connector_worker_meta": "receipts are forecasts; the index is compared with what the workers hold",
    "slots": "rows that cross updated slots are computed anew, by live gates",
    "server": "a streamed answer ends without its receipt",
    "observe": "the counts of one report are lost",
    "shutdown": "the engine stops all the same",
}


def reason(entry: str) -> str:
    """The fallback reason in the receipt of a request that lost its reuse."""
    return FAULT + entry


def sticky(error: Exception, device: torch.device | None) -> bool:
    """Whether an error made the GPU unusable: synchronising raises again."""
    if device is None or device.type != "cuda" or not isinstance(error, RuntimeError):
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


class Faults:
    """Counts of faults by entry; the first of a kind is logged with its traceback, later ones are only counted.

    `device` is the model's, None before it is known.
    """

    def __init__(self) -> None:
        self.device: torch.device | None = None
        self.total: Counter[str] = Counter()
        self._new: Counter[str] = Counter()
        self._logged: set[tuple[str, type]] = set()

    def note(self, entry: str, error: Exception) -> None:
        """Count an error at one of `ENTRIES`; raises it again if the GPU is unusable (`sticky`)."""
        if sticky(error, self.device):
            raise error
        self.total[entry] += 1
        self._new[entry] += 1
        kind = entry, type(error)
        if kind not in self._logged:
            self._logged.add(kind)
            consequence = ENTRIES.get(entry, "")
            logger.error("CacheSlide: a fault at %s, not logged again: %s", entry, consequence, exc_info=error)

    def take(self) -> dict[str, int]:
        """Counts since the last call, with the names of `ReuseStats`."""
        new, self._new = self._new, Counter()
        return {f"faults.{entry}": count for entry, count in new.items()}


SERVER = Faults()  # of the process that serves clients


def survives(entry: str, otherwise: Callable[..., Any] | None = None, last: Any = None):
    """Wrap a method that vLLM calls: on an exception return `otherwise(self, *args)`, or `last` without it.

    The owner's `Faults` are its attribute `faults`.
    """

    def wrap(method):
        @wraps(method)
        def guarded(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except Exception as error:
                self.faults.note(entry, error)
            if otherwise is None:
                return last
            try:
                return otherwise(self, *args, **kwargs)
            except Exception as error:
                self.faults.note(entry, error)
            return last

        guarded.entry = entry
        return guarded

    return wrap
