"""A source of samples in the format of `harness.gpu`, with powers by time; and the functions of NVML it stands on."""

import time
from types import SimpleNamespace

from harness.gpu import Sample


class Made:
    """Every sample has the next power of a list, the last one again and again; energy is counted from them."""

    def __init__(self, *powers: float, gpus: int = 1) -> None:
        self.powers, self.gpus, self.taken, self.joules, self.last = list(powers), gpus, 0, 0.0, None

    def read(self) -> Sample:
        now, power = time.perf_counter(), self.powers[min(self.taken, len(self.powers) - 1)]
        self.joules += 0.0 if self.last is None else power * (now - self.last)
        self.taken, self.last = self.taken + 1, now
        each = (power,) * self.gpus
        return Sample(
            now, each, (1980,) * self.gpus, (3201,) * self.gpus, (7 << 30,) * self.gpus, (self.joules,) * self.gpus
        )


class NVMLError(Exception):
    pass


def nvml(count: int, counter: bool = True) -> SimpleNamespace:
    """A library with `count` GPUs; GPU i draws 100 + i W."""

    def energy(gpu: int) -> int:
        if not counter:
            raise NVMLError("Not Supported")
        return 5_000 + gpu

    def init() -> None:
        if not count:
            raise NVMLError("Driver Not Loaded")

    return SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        nvmlInit=init,
        nvmlDeviceGetCount=lambda: count,
        nvmlDeviceGetHandleByIndex=int,
        nvmlDeviceGetHandleByUUID=lambda name: int(name.removeprefix("GPU-")),
        nvmlDeviceGetTotalEnergyConsumption=energy,
        nvmlDeviceGetPowerUsage=lambda gpu: 1000 * (100 + gpu),
        nvmlDeviceGetClockInfo=lambda gpu, kind: 1000 * kind + gpu,
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=gpu + 1),
    )
