"""Selects timed blocks that `harness.quiet` did not mark. Blocks of older records are "not checked".

A table leaves disturbed blocks out. If too few are left, it takes all of them, gives the reason in the row's
`disturbed` and no ratio: such times may be shown with that remark, but support no conclusion.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from harness.quiet import KEPT, Reading

Readings = Sequence[Reading | None]
FEW = "timings disturbed"


def disturbed(reading: Reading | None) -> bool:
    """Whether a block is marked. Blocks without a finished reading are not."""
    return bool(reading) and bool(reading.get("disturbed"))


def too_few(readings: Readings) -> str:
    """Why the blocks give no result: fewer than `KEPT` of them were undisturbed; empty if they give one."""
    bad = sum(map(disturbed, readings))
    return f"{FEW}: other work ran beside {bad} of {len(readings)} blocks" if bad > (1 - KEPT) * len(readings) else ""


def kept(readings: Readings) -> list[bool]:
    """Which blocks a table takes: the undisturbed ones, or all if those are too few."""
    every = bool(too_few(readings))
    return [every or not disturbed(r) for r in readings]


def pick(values: Sequence[Any], readings: Readings) -> list[Any]:
    """The values of the blocks that a table takes; all if there are no readings."""
    return [v for v, ok in zip(values, kept(readings), strict=True) if ok] if readings else list(values)


def counted(readings: Iterable[Reading | None]) -> dict[str, int]:
    """`blocks`, and how many of them are `disturbed` and `not_checked`."""
    blocks = list(readings)
    return {"blocks": len(blocks), "disturbed": sum(map(disturbed, blocks)), "not_checked": sum(not r for r in blocks)}


def added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Counts of several files together."""
    total = {"blocks": 0, "disturbed": 0, "not_checked": 0}
    for one in counts:
        total = {key: n + one[key] for key, n in total.items()}
    return total


def rounds_of(record: Mapping[str, Any], *systems: str) -> Readings:
    """A latency record's reading of every round of the given systems: a marked one if any is marked."""
    by_system = []
    for system in systems:
        repeats = len(record["systems"][system]["ttft_seconds"])
        of = next((q["rounds"] for q in record.get("quiet", ()) if system in q["systems"]), [None] * repeats)
        by_system.append(of)
    return [next((r for r in each if disturbed(r)), each[0]) for each in zip(*by_system, strict=True)]


def slices_of(record: Mapping[str, Any]) -> tuple[list[int], Readings]:
    """A throughput record's slices: the requests of each, and readings; unchecked if it has none."""
    return record.get("slices", [len(record["requests"])]), record.get("quiet", [None])


def cells_of(record: Mapping[str, Any]) -> Readings:
    """A record of agents under load: the reading of every system's run."""
    quiet = record.get("quiet", {})
    return [quiet.get(system) for system in record["systems"]]


def together(readings: Readings) -> Reading | None:
    """One reading for runs that are compared: marked if any is, None if any was not checked."""
    marked = next((r for r in readings if disturbed(r)), None)
    return marked or (None if not readings or any(not r for r in readings) else readings[0])


def steps_of(record: Mapping[str, Any]) -> Readings:
    """A replayed episode: the reading of every step."""
    steps = max((len(s) for s in record["systems"].values()), default=0)
    return record.get("quiet", [None] * steps)
