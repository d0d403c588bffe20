"""Passes receipts from a worker to the scheduler in one process.

vLLM gives worker reports to the scheduler after it has closed the step's finished requests: too late for the receipt of
a request that ends with its first token. If both are in one process (no tensor parallelism), the worker leaves the
receipt here; otherwise such a receipt is the scheduler's forecast.
"""

from typing import Any

_BOXES: dict[str, dict[str, dict[str, Any]]] = {}


def open_box(engine_id: str) -> dict[str, dict[str, Any]]:
    """Open the scheduler's box: receipts by request id."""
    return _BOXES.setdefault(engine_id, {})


def post(engine_id: str, req_id: str, receipt: dict[str, Any]) -> None:
    """Leave a receipt, if the scheduler of this engine is in this process."""
    if (box := _BOXES.get(engine_id)) is not None:
        box[req_id] = receipt


def close_box(engine_id: str) -> None:
    """Remove the box of a scheduler."""
    _BOXES.pop(engine_id, None)
