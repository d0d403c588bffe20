"""Figure 4a: CKSim of a cached segment's keys against the shift of its position, and why it falls."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.plots.style import BLACK, BLUE, GREY, VERMILLION, new_figure, nothing
from harness.results.curves import cksim_rows
from harness.results.runs import read_file

PAPER_SHIFT = 1000
PAPER_ROPE, PAPER_COPE = 0.10, 0.72  # what is left after "drops by more than 90 %" and "by 28 %"
PREDICTED = (0.16, 0.28)  # stale RoPE keys of isotropic content at shift 1000, base 10,000


def load(path: str | Path) -> list[dict[str, Any]]:
    """The table of CKSim by shift."""
    return cksim_rows(read_file(path).records)


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Left: the position encoding alone (the paper's protocol). Right: behind a real prefix."""
    figure = new_figure(9.2, 4.7)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, why, title in (
        (panels[0], "position", "Position only: the segment does not see the prefix"),
        (panels[1], "context", "With context: the segment attends to the prefix"),
    ):
        axes.set_title(title)
        if rows:
            _panel(axes, rows, why)
        else:
            nothing(axes, "no CKSim was measured")
    if rows:
        panels[0].set_ylabel("CKSim, mean over layers")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, columnspacing=3)
    return figure


def _panel(axes: Axes, rows: list[dict[str, Any]], why: str) -> None:
    shifts = [r["shift"] for r in rows]
    for how, colour, marker, line, label in (
        ("stale", VERMILLION, "o", "-", "RoPE, keys left where they were (stale)"),
        ("delta", BLUE, "s", "--", "RoPE, keys re-rotated (delta)"),
    ):
        cells = [r[f"{why}_{how}"] for r in rows]
        low, high = [min(c["layers"]) for c in cells], [max(c["layers"]) for c in cells]
        axes.fill_between(shifts, low, high, color=colour, alpha=0.13, lw=0)
        axes.plot(shifts, low, color=colour, lw=0.5, ls=line)
        axes.plot(shifts, high, color=colour, lw=0.5, ls=line)
        axes.plot(shifts, [c["value"] for c in cells], line, color=colour, marker=marker, ms=5, lw=1.8, label=label)
        spans = [(c["low"], c["high"]) for c in cells if c["low"] is not None]
        if len(spans) == len(cells):
            axes.vlines(shifts, *zip(*spans, strict=True), color=colour, lw=1.2)
    right = max(max(shifts), PAPER_SHIFT)
    _paper(axes, right, why)
    axes.fill_between([], [], color=GREY, alpha=0.3, lw=0, label="band: from the smallest to the largest layer")
    axes.set(xlim=(-0.02 * right, 1.09 * right), ylim=(min(-0.05, *axes.get_ylim()), 1.06))
    axes.set_xlabel("shift of the segment (tokens)")


def _paper(axes: Axes, right: float, why: str) -> None:
    """The paper's numbers, and what isotropic content would give, at their shift."""
    x = PAPER_SHIFT + 0.045 * right
    marks = {"mec": BLACK, "color": "white", "ms": 7, "mew": 1.3, "ls": "none", "clip_on": False, "zorder": 5}
    axes.plot(x, PAPER_ROPE, marker="v", label="paper: RoPE, at most 0.10 is left", **marks)
    axes.plot(x, PAPER_COPE, marker="P", label="paper: CoPE, 0.72 is left (no CoPE model here yet)", **marks)
    if why == "position":
        axes.errorbar(
            x, sum(PREDICTED) / 2, yerr=(PREDICTED[1] - PREDICTED[0]) / 2, color=GREY, lw=5, capsize=0, zorder=4,
            label="predicted: stale, isotropic content, base 10⁴",
        )  # fmt: skip
