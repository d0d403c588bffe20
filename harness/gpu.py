"""Power, clocks and memory of GPUs beside a timed block, from NVML.

    with Monitor(open_source(1)) as gpus:
        gpus.rest(2.0)              # power at rest
        with gpus.block() as gpu:
            ...                     # the timed work
        record["gpu"] = gpu

Fields of a reading; powers, energies and memory are sums over the GPUs, clocks over all samples of all GPUs:

seconds, samples               length of the block; readings of NVML in it, its two ends included
power_mean_w, power_max_w      time-weighted mean, and the largest sample
energy_j                       power integrated over the block by trapezoids
energy_counter_j               the driver's own energy counter over the block; None where a GPU has none
idle_w                         power at rest, before the first block; None if `rest` was not called
sm_mhz, memory_mhz             [least, median, largest]
memory_bytes                   largest memory in use, of all processes

NVML refreshes power every 20 to 100 ms, so that energy of a shorter block is no result; its clocks are.
"""

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Protocol

from cacheslide.errors import ConfigError

Reading = dict[str, Any]
EVERY_S = 0.05  # between samples: a tick costs about a millisecond of one core
KEPT_S = 1200.0  # samples older than this are dropped


@dataclass(frozen=True)
class Sample:
    """One reading of all GPUs, a value each; `at` is `time.perf_counter`.

    Power in W, clocks in MHz, memory in bytes, energy since the driver was loaded in J (None where not counted).
    """

    at: float
    power_w: tuple[float, ...]
    sm_mhz: tuple[int, ...]
    memory_mhz: tuple[int, ...]
    memory_bytes: tuple[int, ...]
    energy_j: tuple[float, ...] | None = None


class Source(Protocol):
    """Where samples come from."""

    def read(self) -> Sample:
        """A sample taken now."""
        ...


class Nvml:
    """The first `count` GPUs that this process may use, read through nvidia-ml-py."""

    def __init__(self, count: int, environ: Mapping[str, str] = os.environ) -> None:
        import pynvml

        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            names = visible(environ, pynvml.nvmlDeviceGetCount())
            if len(names) < count:
                raise ConfigError(f"{count} GPUs are needed, {len(names)} can be used")
            self._gpus = [self._handle(name) for name in names[:count]]
        except pynvml.NVMLError as missing:
            raise ConfigError(f"no NVIDIA GPU can be read here: {missing}") from None
        self._counts = all(self._energy(gpu) is not None for gpu in self._gpus)

    def _handle(self, name: str) -> Any:
        if name.isdigit():
            return self._nvml.nvmlDeviceGetHandleByIndex(int(name))
        return self._nvml.nvmlDeviceGetHandleByUUID(name)

    def _energy(self, gpu: Any) -> float | None:
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3
        except self._nvml.NVMLError:
            return None

    def read(self) -> Sample:
        """See `Source.read`."""
        nvml, gpus = self._nvml, self._gpus
        return Sample(
            time.perf_counter(),
            tuple(nvml.nvmlDeviceGetPowerUsage(g) / 1e3 for g in gpus),
            tuple(nvml.nvmlDeviceGetClockInfo(g, nvml.NVML_CLOCK_SM) for g in gpus),
            tuple(nvml.nvmlDeviceGetClockInfo(g, nvml.NVML_CLOCK_MEM) for g in gpus),
            tuple(nvml.nvmlDeviceGetMemoryInfo(g).used for g in gpus),
            tuple(self._energy(g) for g in gpus) if self._counts else None,
        )


def visible(environ: Mapping[str, str], count: int) -> list[str]:
    """Indices or UUIDs of the GPUs that CUDA_VISIBLE_DEVICES leaves of `count`, in CUDA's order."""
    given = environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return [str(i) for i in range(count)]
    return [name for name in (part.strip() for part in given.split(",")) if name and name != "-1"]


class Monitor:
    """Samples a source in a thread of its own while it is entered; without a source readings are None."""

    def __init__(self, source: Source | None, every: float = EVERY_S) -> None:
        self.source, self.every = source, every
        self.idle_w: float | None = None
        self._samples: list[Sample] = []
        self._ended, self._lock, self._thread = threading.Event(), threading.Lock(), None

    def __enter__(self) -> "Monitor":
        if self.source is not None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self.every):
            self._take()

    def _take(self) -> Sample:
        with self._lock:  # samples are in order of time
            sample = self.source.read()
            self._samples.append(sample)
            if self._samples[0].at < sample.at - 2 * KEPT_S:
                self._samples = [s for s in self._samples if s.at >= sample.at - KEPT_S]
            return sample

    def rest(self, seconds: float) -> float | None:
        """Wait, and keep the mean power as that at rest; None without a source."""
        with self.block() as reading:
            if self.source is not None:
                time.sleep(seconds)
        self.idle_w = reading.get("power_mean_w")
        return self.idle_w

    @contextmanager
    def block(self) -> Iterator[Reading]:
        """Yield a dictionary that holds the block's reading once it has ended; empty without a source."""
        reading: Reading = {}
        if self.source is None:
            yield reading
            return
        begun = self._take().at
        yield reading
        self._take()
        with self._lock:
            samples = [s for s in self._samples if s.at >= begun]
        reading |= summarise(samples) | {"idle_w": self.idle_w}


def summarise(samples: Sequence[Sample]) -> Reading:
    """The reading of a block from its samples, of which the first and the last are its ends."""
    seconds = samples[-1].at - samples[0].at
    powers = [sum(s.power_w) for s in samples]
    joules = sum((b.at - a.at) * (p + q) / 2 for (a, p), (b, q) in pairwise(zip(samples, powers, strict=True)))
    ends = samples[0].energy_j, samples[-1].energy_j
    return {
        "seconds": round(seconds, 4),
        "samples": len(samples),
        "power_mean_w": round(joules / seconds if seconds else powers[0], 2),
        "power_max_w": round(max(powers), 2),
        "energy_j": round(joules, 3),
        "energy_counter_j": None if None in ends else round(sum(ends[1]) - sum(ends[0]), 3),
        "sm_mhz": _spread([x for s in samples for x in s.sm_mhz]),
        "memory_mhz": _spread([x for s in samples for x in s.memory_mhz]),
        "memory_bytes": max(sum(s.memory_bytes) for s in samples),
    }


def _spread(values: Sequence[int]) -> list[float]:
    return [min(values), median(values), max(values)]


def open_source(device: str, count: int) -> Source | None:
    """NVML's `count` GPUs with device "cuda", ConfigError where there are none; None on a CPU."""
    return Nvml(count) if device == "cuda" else None
