"""Interleaves the arms of one comparison, so that a disturbance of the machine affects all of them."""

from collections.abc import Callable, Sequence
from typing import Any

from harness.quiet import Watch

Run = dict[str, Any]


def in_turns(
    arms: Sequence[str], once: Callable[[str], Run], repeats: int, warmups: int
) -> dict[str, tuple[list[Run], str | None]]:
    """Runs of every arm, each with its turn's reading of `harness.quiet`, and the reason of a failure.

    `once` measures one run of an arm; a RuntimeError ends the arm. The first `warmups` turns do not count.
    """
    found: dict[str, list[Run]] = {arm: [] for arm in arms}
    failed: dict[str, str] = {}
    watch = None
    for turn in range(warmups + repeats):
        runs = []
        if turn == warmups:
            watch = Watch()
        for arm in arms:
            if arm in failed:
                continue
            try:
                run = once(arm)
            except RuntimeError as wrong:
                failed[arm] = str(wrong)
                continue
            runs.append(run)
            if turn >= warmups:
                found[arm].append(run)
        if watch is not None:
            reading = watch.lap()
            for run in runs:
                run["quiet"] = reading
    return {arm: (found[arm], failed.get(arm)) for arm in arms}
