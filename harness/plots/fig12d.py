"""Figure 12d; see `fig12`."""

from harness.plots.fig12 import draw_d as draw
from harness.results.runs import read_json as load

__all__ = ["draw", "load"]
