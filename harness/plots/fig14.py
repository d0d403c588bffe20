"""Figure 14: correct calls per second over the share of recomputed tokens (top-k) and the threshold τ."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.plots.style import GREY, new_figure, nothing, remark
from harness.plots.task_labels import agents_in, of_task
from harness.results.agents import grid_table
from harness.results.runs import read_file


def load(path: str | Path) -> dict[str, Any]:
    """The table of a record file, with the agents of its episodes."""
    file = read_file(path)
    return grid_table(file) | {"agents": agents_in(file)}


def draw(table: dict[str, Any]) -> Figure:
    """Left: correct calls per second. Right: share of right calls. A ring marks the paper's setting."""
    figure = new_figure(11.0, 4.6)
    if not table or not table["cells"]:
        nothing(figure.add_subplot(), "no heat map was measured")
        return figure
    left, right = figure.subplots(1, 2)
    title = of_task(f"Correct calls a second{remark([table])}", table.get("agents", ()))
    _map(left, table, lambda c: c["qps"]["value"], title, "{:.1f}")
    _map(right, table, lambda c: c["right"], "Share of right calls", "{:.2f}")
    every = "layer" if table["every"] == 1 else f"{table['every']} layers"
    note = f"{table['episodes']} episodes; converged rows are swapped every {every}; ring: the cell next to"
    figure.supxlabel(
        f"{note} the paper's top-k 0.26, τ 0.12; star: the highest", fontsize=8, color=GREY, x=0.01, ha="left"
    )
    return figure


def _map(axes: Axes, table: dict[str, Any], value, title: str, form: str) -> None:
    ratios, taus = table["recompute_ratios"], table["taus"]
    found = {(c["recompute_ratio"], c["tau"]): value(c) for c in table["cells"]}
    grid = np.array([[found.get((s, t), np.nan) for s in ratios] for t in taus], dtype=float)
    axes.pcolormesh(grid, cmap="Blues", vmin=0, edgecolors="white", linewidth=0.8)  # vector, unlike an image
    top = np.nanmax(grid)
    for (y, x), v in np.ndenumerate(grid):
        ink = "white" if v > 0.6 * top else "black"
        axes.text(x + 0.5, y + 0.5, form.format(v), ha="center", va="center", fontsize=8, color=ink)
    near = np.argmin(np.abs(np.array(ratios) - 0.26)), np.argmin(np.abs(np.array(taus) - 0.12))
    axes.plot(near[0] + 0.5, near[1] + 0.5, "o", ms=30, mfc="none", mec="black", mew=1.2)
    if (grid == top).sum() == 1:
        best = np.unravel_index(np.nanargmax(grid), grid.shape)
        axes.annotate("★", (best[1] + 0.5, best[0] + 0.5), (9, 7), textcoords="offset points", fontsize=9)
    axes.set_xticks(np.arange(len(ratios)) + 0.5, [f"{s:g}" for s in ratios])
    axes.set_yticks(np.arange(len(taus)) + 0.5, [f"{t:g}" for t in taus])
    axes.set(xlabel="top-k (share of the reused tokens)", ylabel="threshold τ", title=title)
    axes.grid(visible=False)
