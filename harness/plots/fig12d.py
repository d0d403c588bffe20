"""Figure 12d: GPU pages against PromptCache; see `fig12`."""

from harness.plots.fig12 import draw_d as draw
from harness.results.runs import read_json as load

__all__ = ["draw", "load"]
