"""Load tests: arrival processes, the driver that runs episodes, and throughput and latency measures."""

from harness.load.arrivals import Closed, Poisson, Replayed, Steady
from harness.load.driver import drive
from harness.load.measures import Done, goodput, qps_correct, series, summary

__all__ = [
    "Closed",
    "Done",
    "Poisson",
    "Replayed",
    "Steady",
    "drive",
    "goodput",
    "qps_correct",
    "series",
    "summary",
]
