"""Whether anything else ran beside a timed block: readings before and after it, and the rule that marks it.

    with watched() as quiet:
        ...                # what is timed
    record["quiet"] = quiet

A reading is what a record keeps:

load_before, load_after                    load average over the last minute
calibration_before_s, calibration_after_s  seconds of the fixed work `calibrate`
calibration_best_s                         its fastest time in this process so far
seconds, cores                             length of the block; cores of the machine, since others' time is of all of
                                           them: where this process may use few of many, the calibration tells more
others_cpu_share                           share of all cores' time that other processes and the hypervisor took; None
                                           where the system does not say
others_seconds                             the time that this share is of: the block's, and around one shorter than
                                           `SPAN_S` what came before it (earlier blocks of one `Watch`) or right behind
disturbed, why                             what `judge` made of the rest

Only ever a mark: nothing is timed again and nothing fails. CPU work on the host is seen, other work of a GPU is not.
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

OTHERS_SHARE = 0.05  # of all cores' time: what daemons take is below, one busy neighbour on up to 16 cores is above
SLACK_SECONDS = 0.05  # CPU time that the counters' ticks of 10 ms may misplace, however short the time between readings
SPAN_S = 0.3  # seconds at least over which others' time is taken: the slack is then a twelfth of two cores
SLOWER = 1.3  # times the fastest calibration; a core's clock alone changes by less
LOAD_OVER = 1.25  # running processes a core, where others' CPU time is not known
KEPT = 0.5  # a number is published if at least this share of its timed blocks was undisturbed

_STEPS, _SIZE, _PRODUCTS, _TRIES = 60_000, 512, 3, 3
_CERTAIN = 3.0  # times the fastest: somebody is there, whatever a further try says


def judge(reading: Mapping[str, Any]) -> str:
    """Why the block was disturbed; empty when it was not. Decides by the reading alone.

    Disturbed is a block in which others took more than `OTHERS_SHARE` of all cores' time (and `SLACK_SECONDS`), or
    beside which the calibration took more than `SLOWER` times its fastest. Where others' time is not known, the load
    average decides in its place: more than `LOAD_OVER` a core. (Known, it says nothing more: it lags by a minute.)
    """
    others, cores = reading["others_cpu_share"], reading["cores"]
    over = reading.get("others_seconds", reading["seconds"])  # records of before have the block's time alone
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

    Each call runs it up to `_TRIES` times and takes the fastest, so that a single interrupt is not a neighbour.
    """

    def __init__(self) -> None:
        self.best: float | None = None  # seconds
        self._threads = 0
        self._x = torch.full((_SIZE, _SIZE), 1.0 / _SIZE)

    def __call__(self) -> float:
        """Seconds of the work now."""
        if self._threads != torch.get_num_threads():  # other threads are another work: not comparable, and start slowly
            self._threads, self.best = torch.get_num_threads(), None
            self._once()
        taken = self._once()
        for _ in range(_TRIES - 1):
            if self.best is not None and not SLOWER < taken / self.best <= _CERTAIN:
                break  # nobody is here, or somebody for certain: no need to ask again
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
    """CPU seconds that anything has used on this machine, time the hypervisor took away included; None if unknown."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        user, nice, system, _, _, irq, softirq, steal = map(int, fields[1:9])
    except (OSError, ValueError):
        return None
    busy = user + nice + system + irq + softirq + steal
    return busy / os.sysconf("SC_CLK_TCK") if busy else None  # some sandboxes show zeros


def own_cpu_s() -> float:
    """CPU seconds of this process and of all it has started, servers and workers too, whether they still run or not."""
    me, total = psutil.Process(), 0.0
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue  # it has just ended; its parent's times have it
        total += times.user + times.system + times.children_user + times.children_system
    return total


@dataclass(frozen=True)
class _Counters:
    """CPU seconds of the machine and of this process and its children so far, at a time by `perf_counter`."""

    at: float
    machine: float | None
    own: float

    @classmethod
    def read(cls) -> "_Counters":
        return cls(time.perf_counter(), machine_cpu_s(), own_cpu_s())

    def others_since(self, begun: "_Counters", cores: int) -> float | None:
        """The share of all cores' time that others took since `begun`; None where the system does not say."""
        if self.machine is None or begun.machine is None:
            return None
        spent = (self.machine - begun.machine) - (self.own - begun.own)
        return min(1.0, max(0.0, spent / (cores * max(self.at - begun.at, 1e-9))))


class Watch:
    """Readings of blocks that follow each other: the calibration behind one is the one in front of the next.

    The counters' ticks are too coarse for a short block. Others' time is then taken over at least `SPAN_S`, from the
    blocks before it on; a first block that is short waits behind its end until so much time has passed.
    """

    def __init__(self) -> None:
        self._marks = [_Counters.read()]  # where blocks began and ended, as far back as a next block may need them
        self._before, self._load = calibrate(), os.getloadavg()[0]
        self._open()

    def _open(self) -> None:
        self._marks.append(_Counters.read())
        self._begun = time.perf_counter()

    def lap(self) -> Reading:
        """The reading of the block that ends here; the next one begins."""
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
    """Around a timed block: a dictionary that holds its reading once the block has ended without an exception."""
    reading: Reading = {}
    watch = Watch()
    yield reading
    reading |= watch.lap()
