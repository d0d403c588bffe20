"""Detects other load during a timed block: readings before and after it, and the rule that marks it disturbed.

    with watched() as quiet:
        ...                # the timed work
    record["quiet"] = quiet

Fields of a reading, which records keep:

load_before, load_after                    load average over the last minute
calibration_before_s, calibration_after_s  seconds of the fixed work `calibrate`
calibration_best_s                         its fastest time in this process so far
seconds, cores                             length of the block; cores of the machine, over all of which others' time is
                                           counted: for a process limited to few cores, calibration is more sensitive
others_cpu_share                           share of all cores' time that other processes and the hypervisor took; None
                                           if the system does not report it
others_seconds                             the time this share is taken over: the block; if shorter than `SPAN_S`,
                                           also earlier blocks of the same `Watch` or the time right after it
disturbed, why                             the verdict of `judge`

A disturbed block is only marked: it is not repeated and no error is raised. Load on the host CPU is detected, other
load on a GPU is not.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

Reading = dict[str, Any]

OTHERS_SHARE = 0.05  # of all cores' time: daemons stay below, one busy process on up to 16 cores is above
SLACK_SECONDS = 0.05  # CPU time that the counters' ticks of 10 ms may misplace, however short the time between readings
SPAN_S = 0.3  # minimum seconds over which others' time is taken: the slack is then a twelfth of two cores
SLOWER = 1.3  # times the fastest calibration; a core's clock alone changes by less
LOAD_OVER = 1.25  # running processes per core; used if others' CPU time is not known
KEPT = 0.5  # a number is published if at least this share of its timed blocks was undisturbed

_STEPS, _SIZE, _PRODUCTS, _TRIES = 60_000, 512, 3, 3
_CERTAIN = 3.0  # times the fastest: certainly disturbed, no further try needed


def judge(reading: Mapping[str, Any]) -> str:
    """Why the block was disturbed, from its reading alone; empty if it was not.

    A block is disturbed if others took more than `OTHERS_SHARE` of all cores' time (and `SLACK_SECONDS`), or if the
    calibration beside it took more than `SLOWER` times its fastest. If others' time is not known, the load average is
    used instead: more than `LOAD_OVER` per core. (Otherwise it is ignored, since it lags by a minute.)
    """
    others, cores = reading["others_cpu_share"], reading["cores"]
    over = reading.get("others_seconds", reading["seconds"])  # older records have only the block's time
    if others is None:
        load = max(reading["load_before"], reading["load_after"])
        if load > LOAD_OVER * cores:
            return f"load average {load:.1f} on {cores} cores"
    elif others > OTHERS_SHARE + SLACK_SECONDS / (cores * max(over, 1e-9)):
        return f"others took {others:.0%} of {cores} cores"
    slower = max(reading["calibration_before_s"], reading["calibration_after_s"]) / reading["calibration_best_s"]
    return f"the calibration loop took {slower:.2f} times as long" if slower > SLOWER else ""


class Calibration:
    """A fixed piece of work, about 10 ms: a loop in Python on one core, matrix products on all cores that PyTorch uses.

    Each call runs it up to `_TRIES` times and takes the fastest, so that a single interrupt does not count as load.
    """

    def __init__(self) -> None:
        self.best: float | None = None  # seconds
        self._threads = 0
        self._x = torch.full((_SIZE, _SIZE), 1.0 / _SIZE)

    def __call__(self) -> float:
        """Seconds that the work takes now."""
        if self._threads != torch.get_num_threads():  # another thread count: not comparable, and starts slowly
            self._threads, self.best = torch.get_num_threads(), None
            self._once()
        taken = self._once()
        for _ in range(_TRIES - 1):
            if self.best is not None and not SLOWER < taken / self.best <= _CERTAIN:
                break  # clearly undisturbed or clearly disturbed: no further try needed
            taken = min(taken, self._once())
        self.best = taken if self.best is None else min(self.best, taken)
        return taken

    def _once(self) -> float:
        begun, total = time.perf_counter(), 0
        for i in range(_STEPS):
            total += i
        x = self._x
        for _ in range(_PRODUCTS):
            x = x @ self._x
        return time.perf_counter() - begun


calibrate = Calibration()


def machine_cpu_s() -> float | None:
    """CPU seconds used on this machine by all processes, including stolen time; None if unknown."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        user, nice, system, _, _, irq, softirq, steal = map(int, fields[1:9])
    except (OSError, ValueError):
        return None
    busy = user + nice + system + irq + softirq + steal
    return busy / os.sysconf("SC_CLK_TCK") if busy else None  # some sandboxes show zeros


def own_cpu_s() -> float:
    """CPU seconds of this process and all its descendants (servers, workers), running or ended."""
    me, total = psutil.Process(), 0.0
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue  # it has just ended; its time is in its parent's
        total += times.user + times.system + times.children_user + times.children_system
    return total


@dataclass(frozen=True)
class _Counters:
    """CPU seconds so far of the machine and of this process with its children, at a `perf_counter` time."""

    at: float
    machine: float | None
    own: float

    @classmethod
    def read(cls) -> "_Counters":
        return cls(time.perf_counter(), machine_cpu_s(), own_cpu_s())

    def others_since(self, begun: "_Counters", cores: int) -> float | None:
        """The share of all cores' time that others took since `begun`; None if not reported."""
        if self.machine is None or begun.machine is None:
            return None
        spent = (self.machine - begun.machine) - (self.own - begun.own)
        return min(1.0, max(0.0, spent / (cores * max(self.at - begun.at, 1e-9))))


class Watch:
    """Readings of consecutive blocks: the calibration after one block is the calibration before the next.

    The counters' ticks are too coarse for a short block. Others' time is then taken over at least `SPAN_S`,
    including the blocks before it; after a short first block, `lap` waits until that much time has passed.
    """

    def __init__(self) -> None:
        self._marks = [_Counters.read()]  # block boundaries, as far back as the next block may need
        self._before, self._load = calibrate(), os.getloadavg()[0]
        self._open()

    def _open(self) -> None:
        self._marks.append(_Counters.read())
        self._begun = time.perf_counter()

    def lap(self) -> Reading:
        """End the current block, return its reading and begin the next."""
        seconds, end = time.perf_counter() - self._begun, _Counters.read()
        while end.at - self._marks[0].at < SPAN_S:
            time.sleep(max(0.001, SPAN_S - (end.at - self._marks[0].at)))
            end = _Counters.read()
        begun = next(mark for mark in reversed(self._marks) if end.at - mark.at >= SPAN_S)
        cores = os.cpu_count() or 1
        others = end.others_since(begun, cores)
        load, after = os.getloadavg()[0], calibrate()
        out: Reading = {
            "load_before": self._load,
            "load_after": load,
            "calibration_before_s": round(self._before, 6),
            "calibration_after_s": round(after, 6),
            "calibration_best_s": round(calibrate.best, 6),
            "seconds": round(seconds, 4),
            "cores": cores,
            "others_cpu_share": None if others is None else round(others, 4),
            "others_seconds": round(end.at - begun.at, 4),
        }
        out["why"] = judge(out)
        out["disturbed"] = bool(out["why"])
        self._before, self._load = after, load
        self._marks = [*(mark for mark in self._marks if mark.at >= begun.at), end]
        self._open()
        return out


@contextmanager
def watched() -> Iterator[Reading]:
    """Yield a dictionary that holds the timed block's reading once it has ended without an exception."""
    reading: Reading = {}
    watch = Watch()
    yield reading
    reading |= watch.lap()
