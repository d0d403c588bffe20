"""Load: when agents arrive, what they got done, and the series and rates that follow from it."""

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
