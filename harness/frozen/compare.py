"""Differences between two recordings of the fixed request set."""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cacheslide import renamed
from cacheslide.errors import DataError
from harness.results.runs import read_json

ROUNDING = 1e-6  # tolerance for floats if bits are not compared


def recorded(path: Path) -> dict[str, Any]:
    """Content of a file written by `record`: `outcomes` by part, and `machine`; DataError for any other file."""
    try:
        content = read_json(path)
        return {"outcomes": content["outcomes"], "machine": content["machine"]}
    except OSError as missing:
        raise DataError(f"{path} cannot be read: {missing.strerror}") from None
    except (KeyError, TypeError):
        raise DataError(f"{path} holds no outcomes: `python -m harness.frozen record {path}` writes them") from None


def add_records(parser: argparse.ArgumentParser) -> None:
    """Add --recorded and --now, two files of `record`, whose differences `changed_of` gives."""
    parser.add_argument("--recorded", type=Path, help="outcomes of `harness.frozen record` before")
    parser.add_argument("--now", type=Path, help="outcomes of it now, on the same machine")


def changed_of(args: argparse.Namespace) -> list[str] | None:
    """Differences of the outcomes that both files have; None unless both files are given."""
    if args.recorded is None or args.now is None:
        return None
    return compared(args.recorded, args.now)[0]


def compared(before: Path, after: Path, bits: bool = True) -> tuple[list[str], list[str]]:
    """`differences` of two files written by `record`, and the outcomes that only the second one has.

    Raises
    ------
    DataError
        If a file was not written by `record`, or if `bits` and the numbers of threads differ.
    """
    first, second = recorded(before), recorded(after)
    threads = [side["machine"].get("torch_threads") for side in (first, second)]
    if bits and threads[0] != threads[1]:
        raise DataError(
            f"{before} was recorded with {threads[0]} threads, {after} with {threads[1]}, so their bits differ: "
            "record both with the same OMP_NUM_THREADS, or compare --numbers"
        )
    common, added = {}, []
    for part, outcomes in second["outcomes"].items():
        known = first["outcomes"].get(part, {})
        if part in first["outcomes"]:
            common[part] = {name: outcome for name, outcome in outcomes.items() if name in known}
        added += [f"{part}/{name}" for name in outcomes if name not in known]
    return differences(first["outcomes"], common, bits=bits), added


def differences(before: dict[str, Any], after: dict[str, Any], bits: bool = True) -> list[str]:
    """One line per difference; without `bits` only receipts and tokens are compared.

    Bits are comparable on one machine only, since the order of summation depends on the processor.
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
