"""Throughput by batch: requests per second, and correctly answered requests per second."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.plots.labels import spread
from harness.plots.style import GREY, look, new_figure, nothing, remark, shown_disturbed
from harness.plots.task_labels import of_task
from harness.results.runs import REFERENCE, Run, read_file
from harness.results.timing import throughput_table


def load(path: str | Path) -> list[dict[str, Any]]:
    """The throughput table of a record file."""
    file = read_file(path)
    return [r | {"dataset": file.settings.get("dataset")} for r in throughput_table(Run({}, throughput=file))]


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Left: all requests. Right: correctly answered ones. One line per system, labelled at its end."""
    figure = new_figure(11.0, 4.6)
    panels = figure.subplots(1, 2)
    figure.get_layout_engine().set(w_pad=0.1)
    good = [r for r in rows if r["qps_ratio"] or r["system"] == REFERENCE or shown_disturbed(r)]
    titles = (("qps", "Requests a second"), ("qps_correct", "Correctly answered requests a second"))
    for axes, (key, title) in zip(panels, titles, strict=True):
        axes.set_title(of_task(f"{title}{remark(good)}", {r.get("dataset") for r in rows}))
        if good:
            _panel(axes, good, key)
        else:
            nothing(axes, "no throughput was measured")
    left_out = sorted({look(r["system"], r["title"]).label for r in rows if r not in good})
    if left_out:
        note = "not shown at every batch, no reuse or no recompute beside it: " + ", ".join(left_out)
        figure.supxlabel(note, fontsize=7.5, color=GREY, x=0.01, ha="left")
    return figure


def _panel(axes: Axes, rows: list[dict[str, Any]], key: str) -> None:
    batches = sorted({r["batch"] for r in rows})
    place = {b: i for i, b in enumerate(batches)}
    systems = list(dict.fromkeys(r["system"] for r in rows))
    ends = {}
    for k, system in enumerate(systems):
        own = sorted((r for r in rows if r["system"] == system), key=lambda r: r["batch"])
        style = look(system, own[0]["title"])
        nudge = 0.16 * (k / max(1, len(systems) - 1) - 0.5)  # keeps intervals from overlapping
        xs, ys = [place[r["batch"]] + nudge for r in own], [r[key]["value"] for r in own]
        axes.plot(xs, ys, style.line, lw=1.3, ms=0.85 * style.size, zorder=3, **style.points)
        for x, r in zip(xs, own, strict=True):
            if r[key]["low"] is not None:
                axes.plot([x, x], [r[key]["low"], r[key]["high"]], color=style.colour, lw=0.9, alpha=0.6, zorder=2)
        ends[system] = (xs[-1], ys[-1], style)
    top = max([r[key]["high"] or r[key]["value"] for r in rows] + [1e-9])
    axes.set(xlim=(-0.25, len(batches) - 1 + 0.25), ylim=(0, 1.06 * top), xlabel="concurrent requests (batch)")
    axes.set_xticks(range(len(batches)), [f"{b}" for b in batches])
    axes.set_ylabel("1/s")
    where = spread([y for _, y, _ in ends.values()], 0.052 * top, 0.015 * top, 1.04 * top)
    edge = axes.get_xlim()[1]
    width = 0.035 * (edge - axes.get_xlim()[0])
    for (system, (x, y, style)), at in zip(ends.items(), where, strict=True):
        axes.plot([x, edge, edge + width], [y, y, at], color=style.colour, lw=0.6, alpha=0.7, clip_on=False, zorder=1)
        weight = "bold" if system == "cacheslide" else "normal"
        axes.text(edge + 1.3 * width, at, style.label, color=style.ink, fontsize=8, va="center", weight=weight)
