"""Figure 12a: layer latency by load-write order; see `fig12`."""

from harness.plots.fig12 import draw_a as draw
from harness.results.runs import read_json as load

__all__ = ["draw", "load"]
