"""Figure 12b: write stalls by eviction policy; see `fig12`."""

from harness.plots.fig12 import draw_b as draw
from harness.results.runs import read_json as load

__all__ = ["draw", "load"]
