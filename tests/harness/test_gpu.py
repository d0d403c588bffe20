"""Power, clocks and memory beside a block: the sums, the thread, and NVML's units."""

import sys
import time

import pytest

from cacheslide.errors import ConfigError
from harness.gpu import Monitor, Nvml, Sample, open_source, summarise, visible
from tests.helpers.gpu_samples import Made, nvml


def test_energy_is_power_integrated_over_all_gpus_and_beside_it_the_counter():
    samples = [
        Sample(at, (p, 2 * p), (1000 + at, 1500), (3000, 3000), (1 << 30, 2 << 30), (10.0 * at, 5.0))
        for at, p in ((0, 100), (1, 200), (3, 100))
    ]
    reading = summarise(samples)
    assert reading["energy_j"] == pytest.approx((300 + 600) / 2 * 1 + (600 + 300) / 2 * 2)
    assert reading["power_mean_w"] == pytest.approx(450) and reading["power_max_w"] == 600
    assert reading["energy_counter_j"] == 30 and reading["memory_bytes"] == 3 << 30
    assert reading["sm_mhz"] == [1000, 1251.5, 1500] and reading["seconds"] == 3 and reading["samples"] == 3
    without = [Sample(s.at, s.power_w, s.sm_mhz, s.memory_mhz, s.memory_bytes) for s in samples]
    assert summarise(without)["energy_counter_j"] is None


def test_a_monitor_samples_beside_the_work_and_states_the_power_at_rest():
    with Monitor(Made(50.0), every=0.002) as gpus:
        assert gpus.rest(0.02) == pytest.approx(50)
        gpus.source.powers = [300.0]
        with gpus.block() as reading:
            time.sleep(0.05)
    assert reading["samples"] > 5 and reading["idle_w"] == pytest.approx(50)
    assert reading["energy_j"] == pytest.approx(300 * reading["seconds"], rel=0.01)
    assert reading["energy_counter_j"] == pytest.approx(reading["energy_j"], rel=0.05)
    taken = gpus.source.taken
    time.sleep(0.02)
    assert gpus.source.taken == taken  # the thread has ended


def test_without_a_gpu_there_is_no_reading():
    with Monitor(open_source("cpu", 1)) as gpus, gpus.block() as reading:
        assert gpus.rest(9.0) is None
    assert reading == {}


def test_nvml_reads_the_gpus_that_the_process_may_use_in_watts_and_joules(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", nvml(4))
    sample = Nvml(2, {"CUDA_VISIBLE_DEVICES": "3,GPU-1"}).read()
    assert sample.power_w == (103, 101) and sample.energy_j == pytest.approx((5.003, 5.001))
    assert sample.sm_mhz == (1003, 1001) and sample.memory_mhz == (2003, 2001) and sample.memory_bytes == (4, 2)
    monkeypatch.setitem(sys.modules, "pynvml", nvml(1, counter=False))
    assert Nvml(1, {}).read().energy_j is None


def test_missing_gpus_are_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", nvml(0))
    with pytest.raises(ConfigError, match="no NVIDIA GPU can be read here: Driver Not Loaded"):
        open_source("cuda", 1)
    monkeypatch.setitem(sys.modules, "pynvml", nvml(2))
    with pytest.raises(ConfigError, match="2 GPUs are needed, 1 can be used"):
        Nvml(2, {"CUDA_VISIBLE_DEVICES": "1"})
    assert visible({}, 2) == ["0", "1"] and visible({"CUDA_VISIBLE_DEVICES": ""}, 2) == []
