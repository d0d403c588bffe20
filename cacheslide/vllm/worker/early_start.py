"""Begins loads before vLLM prepares a step's inputs, so that the device works while the host prepares.

vLLM calls a connector only when the inputs of a step's forward are ready: milliseconds of host time in which the device
idles. A load does not need these inputs, so the plugin begins it when the worker receives the step; the forward's work
is launched behind it on the same stream and waits there.
"""

from functools import wraps
from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group


def install() -> None:
    """Make vLLM's workers begin loads first (once a process); steps without loads are unchanged."""
    from vllm.v1.worker.gpu_worker import Worker

    plain = Worker.execute_model
    if hasattr(plain, "begins_loads"):
        return

    @wraps(plain)
    def execute_model(self, scheduler_output: Any) -> Any:
        begin_loads(scheduler_output.kv_connector_metadata)
        return plain(self, scheduler_output)

    execute_model.begins_loads = True
    Worker.execute_model = execute_model


def begin_loads(step: Any) -> None:
    """Begin the loads of a step's plan, if it is this connector's and has any."""
    if not has_kv_transfer_group() or not getattr(step, "loads", None):
        return
    connector = get_kv_transfer_group()
    if hasattr(connector, "begin_loads"):
        connector.begin_loads(step)
