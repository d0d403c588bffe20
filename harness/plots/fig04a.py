"""Figure 4a: CKSim of a cached segment's keys against the shift of its position, with its predicted fall."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.plots.style import BLACK, BLUE, GREEN, GREY, PURPLE, VERMILLION, new_figure, nothing
from harness.plots.task_labels import of_task
from harness.results.curves import cksim_rows
from harness.results.runs import read_file

COPE_FILE = "cksim_cope.jsonl"  # beside the native model's records
PAPER_SHIFT = 1000
PAPER_ROPE, PAPER_COPE = 0.10, 0.72  # remainder after "drops by more than 90 %" and "by 28 %"
SERIES = (
    ("stale", VERMILLION, "o", "-", "RoPE, keys left where they were (stale)"),
    ("delta", BLUE, "s", "--", "RoPE, keys re-rotated (delta)"),
    ("cope", GREEN, "^", "-", "CoPE, live gates"),
    ("ccpe", PURPLE, "D", ":", "CCPE: CoPE, the slot at its calibrated offset"),
)
PANELS = (
    ("position", "Position only: no attention to the prefix"),
    ("context", "With context: the segment attends to the prefix"),
    ("chain", "In a prompt: cached behind the system prompt alone"),
)
PREDICTED = (0.16, 0.28)  # stale RoPE keys of isotropic content at shift 1000, base 10,000


def load(path: str | Path) -> list[dict[str, Any]]:
    """The table of CKSim by shift, with the CoPE model's where its file exists."""
    path = Path(path)
    file = read_file(path)
    rows = {r["shift"]: r | {"dataset": file.settings.get("dataset")} for r in cksim_rows(file.records)}
    beside = path.with_name(COPE_FILE)
    for row in cksim_rows(read_file(beside).records) if beside.is_file() else ():
        rows[row["shift"]] = row | rows.get(row["shift"], {})
    return [rows[shift] for shift in sorted(rows)]


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Left: position encoding alone (the paper's protocol). Next: after a real prefix; with CoPE, in a prompt."""
    shown = [p for p in PANELS if p[0] != "chain" or any(f"chain_{how}" in r for r in rows for how, *_ in SERIES)]
    figure = new_figure(4.6 * len(shown), 4.9)
    panels = figure.subplots(1, len(shown), sharey=True)
    for axes, (why, title) in zip(panels, shown, strict=True):
        axes.set_title(of_task(title, {r.get("dataset") for r in rows}) if axes is panels[0] else title)
        if rows:
            _panel(axes, rows, why)
        else:
            nothing(axes, "no CKSim was measured")
    if rows:
        panels[0].set_ylabel("CKSim, mean over layers")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(shown), columnspacing=3)
    return figure


def _panel(axes: Axes, rows: list[dict[str, Any]], why: str) -> None:
    shifts = [r["shift"] for r in rows]
    for how, colour, marker, line, label in SERIES:
        own = [r for r in rows if f"{why}_{how}" in r]
        if not own:
            continue
        at, cells = [r["shift"] for r in own], [r[f"{why}_{how}"] for r in own]
        low, high = [min(c["layers"]) for c in cells], [max(c["layers"]) for c in cells]
        axes.fill_between(at, low, high, color=colour, alpha=0.13, lw=0)
        axes.plot(at, low, color=colour, lw=0.5, ls=line)
        axes.plot(at, high, color=colour, lw=0.5, ls=line)
        axes.plot(at, [c["value"] for c in cells], line, color=colour, marker=marker, ms=5, lw=1.8, label=label)
        spans = [(c["low"], c["high"]) for c in cells if c["low"] is not None]
        if len(spans) == len(cells):
            axes.vlines(at, *zip(*spans, strict=True), color=colour, lw=1.2)
    right = max(max(shifts), PAPER_SHIFT)
    if why != "chain":
        _paper(axes, right, why, any(f"{why}_cope" in r for r in rows))
    axes.fill_between([], [], color=GREY, alpha=0.3, lw=0, label="band: from the smallest to the largest layer")
    axes.set(xlim=(-0.02 * right, 1.09 * right), ylim=(min(-0.05, *axes.get_ylim()), 1.06))
    axes.set_xlabel("shift of the segment (tokens)")


def _paper(axes: Axes, right: float, why: str, with_cope: bool) -> None:
    """The paper's numbers and the prediction for isotropic content, at the paper's shift."""
    x = PAPER_SHIFT + 0.045 * right
    marks = {"mec": BLACK, "color": "white", "ms": 7, "mew": 1.3, "ls": "none", "clip_on": False, "zorder": 5}
    axes.plot(x, PAPER_ROPE, marker="v", label="paper: RoPE, at most 0.10 is left", **marks)
    cope = "paper: CoPE, 0.72 is left" + ("" if with_cope else " (not measured in this run)")
    axes.plot(x, PAPER_COPE, marker="P", label=cope, **marks)
    if why == "position":
        axes.errorbar(
            x, sum(PREDICTED) / 2, yerr=(PREDICTED[1] - PREDICTED[0]) / 2, color=GREY, lw=5, capsize=0, zorder=4,
            label="predicted: stale, isotropic content, base 10⁴",
        )  # fmt: skip
