"""Checks the records of the study on a real model before tables count them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cacheslide.errors import DataError
from cacheslide.plain_values import shown

TEXTS = ("trial", "dataset", "arm")
NUMBERS = ("compute_fraction", "tokens", "tokens_reused")
SCORES = ("kl", "agreement", "nll_change")
ANSWERED = ("frontier", "layers", "confirm")  # stages in which every prompt has an answer
LAYER = " at layer "
LARGEST = 1e15  # sums of such numbers stay finite


def rule_and_layer(arm: str) -> tuple[str, int | None]:
    """An arm's name without ratio and layer, and its layer."""
    name, _, layer = arm.partition(LAYER)
    return name.rsplit(" ", 2)[0] if name.endswith(" %") else name, int(layer) if layer else None


def check_record(record: Mapping[str, Any], stage: str, path: Path) -> None:
    """Raise DataError, naming file and record, if a field of the tables of `stage` is missing or of a wrong type."""

    def wrong(key: str, wanted: str, value: Any) -> DataError:
        return DataError(f"{path}: record {shown(record['id'])}: {key} must be {wanted}, not {shown(value)}")

    for key in TEXTS:
        if not isinstance(record.get(key), str):
            raise wrong(key, "a text", record.get(key))
    _, behind, layer = record["arm"].partition(LAYER)
    if behind and not (layer.isascii() and layer.isdecimal()):
        raise wrong("the arm's layer", "a count", layer)
    for key in NUMBERS:
        if not _is_number(record.get(key)):
            raise wrong(key, "a number", record.get(key))
    if stage == "histories" and type(record.get("turn")) is not int:
        raise wrong("turn", "a count", record.get("turn"))
    for name in ("greedy", "answer"):
        if name == "answer" and stage not in ANSWERED and name not in record:
            continue
        scores = record.get(name)
        if not isinstance(scores, dict):
            raise wrong(name, "an object", scores)
        for key in SCORES:
            if not _is_number(scores.get(key)):
                raise wrong(f"{name}.{key}", "a number", scores.get(key))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST
