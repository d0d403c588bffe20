"""Receipts between a worker and a scheduler of one process.

vLLM hands worker reports to the scheduler after it has closed the step's finished requests, so the receipt of a
request that ends with its first token would come too late. Where both halves live in one process (no tensor
parallelism), the worker leaves the receipt here; elsewhere such a receipt stays the scheduler's own forecast.
"""

from typing import Any

_BOXES: dict[str, dict[str, dict[str, Any]]] = {}


def open_box(engine_id: str) -> dict[str, dict[str, Any]]:
    """The scheduler's box: receipts by request id."""
    return _BOXES.setdefault(engine_id, {})


def post(engine_id: str, req_id: str, receipt: dict[str, Any]) -> None:
    """Leave a receipt, if the scheduler of this engine lives here."""
    if (box := _BOXES.get(engine_id)) is not None:
        box[req_id] = receipt


def close_box(engine_id: str) -> None:
    """The scheduler is gone."""
    _BOXES.pop(engine_id, None)
