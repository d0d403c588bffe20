"""What differs between two recordings of the fixed request set."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cacheslide import renamed
from cacheslide.errors import DataError
from harness.results.runs import read_json

ROUNDING = 1e-6  # of numbers that are no counts, where bits are not compared


def outcomes_of(path: Path) -> dict[str, dict]:
    """Outcomes by part in a file of `record`; DataError for any other file."""
    try:
        outcomes = read_json(path)["outcomes"]
    except OSError as missing:
        raise DataError(f"{path} cannot be read: {missing.strerror}") from None
    except (KeyError, TypeError):
        raise DataError(f"{path} holds no outcomes: `python -m harness.frozen record {path}` writes them") from None
    return outcomes


def differences(before: dict[str, Any], after: dict[str, Any], bits: bool = True) -> list[str]:
    """A line for every place that differs; without `bits` only receipts and tokens count.

    Bits are equal on one machine only: another processor sums in another order.
    """
    sides = [renamed.record(json.loads(json.dumps(side))) for side in (before, after)]
    return list(_differ("", *sides, bits))


def _differ(place: str, a: Any, b: Any, bits: bool) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            if key not in a or key not in b:
                yield f"{place}/{key}: only {'before' if key in a else 'after'}"
            elif key != "bits" or bits:
                yield from _differ(f"{place}/{key}", a[key], b[key], bits)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _differ(f"{place}/{i}", x, y, bits)
    elif a != b and (bits or not _close(a, b)):
        yield f"{place}: {a!r} before, {b!r} after"


def _close(a: Any, b: Any) -> bool:
    if not (isinstance(a, float) and isinstance(b, float)):
        return False
    return math.isclose(a, b, rel_tol=ROUNDING, abs_tol=ROUNDING)
