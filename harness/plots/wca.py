"""The sweep of WCA's open points: F1 by hop depth against the share of row-layers computed, RoPE above, CoPE below."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    error_bar,
    new_figure,
    nothing,
)
from harness.plots.task_labels import of_task
from harness.results.runs import read_json

load = read_json
TITLES = {"rope": "RoPE", "cope": "CoPE"}
MIX = "deep"  # the mix in which every depth has answers that depend on the updated text
POINTS = {  # factor: colour, marker, legend
    "fusion": (ORANGE, "^", "fusion rule"),
    "gate and swap": (PURPLE, "D", "gate and second selection (τ swap)"),
    "encoding": (GREEN, "v", "chunks encoded in the first turn, or alone"),
    "metric": (SKY, "X", "deviation of V, or of K and V"),
    "promotion": (VERMILLION, "*", "promotion from cached layer inputs"),
}
SIZES = {"v": 6, "*": 10}
APART = 0.012  # offset between factors at one share
LINES = {0.10: ":", 0.26: "-", 0.50: "--"}


def draw(summary: dict[str, Any]) -> Figure:
    """One row of panels a model, one column a hop depth."""
    models = {m: found["mixes"] for m, found in summary.get("models", {}).items() if found["mixes"]}
    if not models:
        figure = new_figure(6, 3)
        nothing(figure.add_subplot(), "no sweep was measured")
        return figure
    tables = {m: mixes.get(MIX) or next(iter(mixes.values())) for m, mixes in models.items()}
    depths = sorted({d["depth"] for rows in tables.values() for row in rows for d in row["by_depth"]})
    figure = new_figure(2.7 * len(depths) + 0.6, 2.9 * len(tables) + 1.1)
    grid = figure.subplots(len(tables), len(depths), sharex=True, sharey=True, squeeze=False)
    figure.suptitle(of_task(f"{MIX} mix", [MIX]), x=0.01, ha="left", fontsize=10)
    for line, (model, rows) in zip(grid, tables.items(), strict=True):
        for axes, depth in zip(line, depths, strict=True):
            answers = max(d["f1"]["values"] for row in rows for d in row["by_depth"] if d["depth"] == depth)
            axes.set_title(f"{TITLES.get(model, model)}, {_hops(depth)}: {answers} answers")
            _panel(axes, rows, depth)
        line[0].set_ylabel("F1")
    for axes in grid[-1]:
        axes.set_xlabel("share of row-layers computed")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(depths)), columnspacing=1.6)
    return figure


def _hops(depth: int) -> str:
    return f"{depth} hop" if depth == 1 else f"{depth} hops"


def _panel(axes: Axes, rows: list[dict[str, Any]], depth: int) -> None:
    found = [(r, d["f1"]) for r in rows for d in r["by_depth"] if d["depth"] == depth]
    for recompute_ratio, style in LINES.items():
        line = [
            (r["compute_fraction"], f1, r["layer"])
            for r, f1 in found
            if _default(r) and r["recompute_ratio"] == recompute_ratio
        ]
        joined = [p for p in line if p[2] > 0]  # layer 0's keys do not depend on context
        if joined:
            xs, ys = [x for x, _, _ in joined], [f1["value"] for _, f1, _ in joined]
            label = f"one selection of {recompute_ratio:.0%} (digit: its layer)"
            axes.plot(xs, ys, style, color=BLUE, marker="o", ms=3.5, lw=1.3, zorder=3, label=label)
        for x, f1, layer in line:
            if not layer:
                axes.plot(x, f1["value"], "o", color=BLUE, mfc="none", ms=4.5, zorder=3)
            if recompute_ratio == 0.26:
                error_bar(axes, x, f1["value"], BLUE, up=(f1["low"], f1["high"]))
                axes.annotate(str(layer), (x, f1["value"]), (2, -9), textcoords="offset points", fontsize=7, color=BLUE)
    for i, (factor, (colour, marker, label)) in enumerate(POINTS.items()):
        beside = APART * (i - len(POINTS) // 2)
        own = [(r["compute_fraction"] + beside, f1) for r, f1 in found if r["factor"] == factor]
        for x, f1 in own:
            error_bar(axes, x, f1["value"], colour, up=(f1["low"], f1["high"]))
        if own:
            marks = {"ls": "none", "marker": marker, "ms": SIZES.get(marker, 5), "mec": "white", "mew": 0.4}
            axes.plot([x for x, _ in own], [f1["value"] for _, f1 in own], color=colour, label=label, zorder=4, **marks)
    for factor, colour, marker in (("no correction", GREY, "d"), ("reference", BLACK, "s")):
        own = [(r["compute_fraction"], f1["value"]) for r, f1 in found if r["factor"] == factor]
        label = "recompute" if factor == "reference" else "no correction (chain, first turn, alone)"
        axes.plot(*zip(*own, strict=True), color=colour, marker=marker, ms=5, ls="none", label=label, zorder=3)
    axes.set(xlim=(0, 1.05), ylim=(-0.04, 1.08))


def _default(row: dict[str, Any]) -> bool:
    return row["factor"] == "selection layer"
