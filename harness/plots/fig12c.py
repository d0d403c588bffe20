"""Figure 12c: bytes written by eviction policy; see `fig12`."""

from harness.plots.fig12 import draw_c as draw
from harness.results.runs import read_json as load

__all__ = ["draw", "load"]
