"""What vLLM calls never raises into it: a fault of ours is logged, counted, and costs reuse where it happened.

vLLM takes an exception from a connector for its own end, and with it that of every other request. Each method that it
calls names what holds instead; what was promised and not done (rows claimed, chunks named by the index) is made good by
`claims.py`, `recovery.py` and the index's resynchronisation. Errors after which a GPU is of no use are raised again.
"""

import logging
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from cacheslide.vllm.scheduler.reasons import FAULT

logger = logging.getLogger("vllm.cacheslide")

# Where a fault may happen, and what holds instead.
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
    """For the receipt of a request that lost its reuse."""
    return FAULT + entry


def sticky(error: Exception, device: torch.device | None) -> bool:
    """Whether a GPU is of no use after an error: it raises again when all work is waited for."""
    if device is None or device.type != "cuda" or not isinstance(error, RuntimeError):
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


class Faults:
    """Counts by entry; the first of a kind is logged with its traceback, later ones are counted only.

    `device` is the model's, once there is one.
    """

    def __init__(self) -> None:
        self.device: torch.device | None = None
        self.total: Counter[str] = Counter()
        self._new: Counter[str] = Counter()
        self._logged: set[tuple[str, type]] = set()

    def note(self, entry: str, error: Exception) -> None:
        """An error was survived at one of `ENTRIES`; raises it again where nothing can follow it (`sticky`)."""
        if sticky(error, self.device):
            raise error
        self.total[entry] += 1
        self._new[entry] += 1
        kind = entry, type(error)
        if kind not in self._logged:
            self._logged.add(kind)
            what = ENTRIES.get(entry, "")
            logger.error("CacheSlide: a fault at %s, not logged again: %s", entry, what, exc_info=error)

    def take(self) -> dict[str, int]:
        """Counts since the last call, as `ReuseStats` names them."""
        new, self._new = self._new, Counter()
        return {f"faults.{entry}": count for entry, count in new.items()}


SERVER = Faults()  # of the process that answers clients


def survives(entry: str, otherwise: Callable[..., Any] | None = None, last: Any = None):
    """Wrap a method that vLLM calls: after an exception `otherwise(self, *args)` stands in for it, else `last`.

    The owner has its `Faults` as `faults`.
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
