"""Figure 11: TTFT with parallel agents and with beams, and CacheSlide's advantage over the best rival."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.plots.labels import spread
from harness.plots.style import BLUE, GREY, error_bar, look, new_figure, nothing, remark
from harness.plots.task_labels import agents_in, of_task
from harness.results.agent_load import load_table
from harness.results.runs import read_file

MODES = {
    "parallel": ("Parallel agents", "agents at work"),
    "beam": ("Beams over one prefill", "beam width"),
    "beam_batch": ("Beam width as batch size", "copies of the request"),
}


def load(path: str | Path) -> list[dict[str, Any]]:
    """The table of a record file, each row with the agents of its episodes."""
    file = read_file(path)
    return [row | {"agents": agents_in(file)} for row in load_table(file)]


def draw(table: list[dict[str, Any]]) -> Figure:
    """One column per mode: TTFT, correct calls per second, ratio of the best rival's TTFT to CacheSlide's."""
    modes = [m for m in MODES if any(r["mode"] == m for r in table)]
    figure = new_figure(max(6.5, 4.2 * len(modes)), 8.6 if modes else 3.0)
    if not modes:
        nothing(figure.add_subplot(), "no load was measured")
        return figure
    figure.get_layout_engine().set(w_pad=0.1)
    grid = figure.subplots(3, len(modes), squeeze=False, height_ratios=(3, 3, 2))
    for column, mode in enumerate(modes):
        rows = sorted((r for r in table if r["mode"] == mode), key=lambda r: r["n"])
        title, label = MODES[mode]
        title = of_task(f"{title}: TTFT{remark(rows)}", rows[0].get("agents", ()))
        _lines(grid[0][column], rows, "ttft", 1e3, title, "ms")
        _lines(grid[1][column], rows, "qps_correct", 1.0, "Correct calls a second", "1/s")
        _advantage(grid[2][column], rows, label)
    note = f"teacher-forced, all systems the same work, {table[0]['repeats']} repeats in turns; lines: 95 % intervals"
    figure.supxlabel(
        f"{note}; an advantage above 1 means that CacheSlide is faster", fontsize=8, color=GREY, x=0.01, ha="left"
    )
    return figure


def _lines(axes: Axes, rows: list[dict[str, Any]], key: str, scale: float, title: str, unit: str) -> None:
    axes.set_title(title)
    ends = {}
    systems = [s["system"] for s in rows[0]["systems"]]
    for i, system in enumerate(systems):
        own = [s for r in rows for s in r["systems"] if s["system"] == system]
        style = look(system, own[0]["title"])
        xs = [k + 0.2 * (i / max(1, len(systems) - 1) - 0.5) for k in range(len(rows))]
        ys = [scale * s[key]["value"] for s in own]
        axes.plot(xs, ys, style.line, lw=1.2, ms=0.75 * style.size, zorder=3, **style.points)
        for x, s in zip(xs, own, strict=True):
            up = [None if s[key][k] is None else scale * s[key][k] for k in ("low", "high")]
            error_bar(axes, x, scale * s[key]["value"], style.colour, up=up)
        ends[system] = (xs[-1], ys[-1], style)
    axes.set_xticks(range(len(rows)), [str(r["n"]) for r in rows])
    top = max(axes.get_ylim()[1], 1e-9)
    axes.set(ylim=(0, top), xlim=(-0.3, len(rows) - 0.7), ylabel=unit)
    where = spread([y for _, y, _ in ends.values()], 0.075 * top, 0.02 * top, 0.99 * top)
    edge, width = axes.get_xlim()[1], 0.04 * (axes.get_xlim()[1] - axes.get_xlim()[0])
    for (x, y, style), at in zip(ends.values(), where, strict=True):
        axes.plot([x, edge, edge + width], [y, y, at], color=style.colour, lw=0.6, alpha=0.7, clip_on=False, zorder=1)
        axes.text(edge + 1.2 * width, at, style.label, color=style.ink, fontsize=7.5, va="center")


def _advantage(axes: Axes, rows: list[dict[str, Any]], label: str) -> None:
    names = [look(r["best"]).label if r["best"] else "" for r in rows]
    if len(set(names)) == 1:
        names = names[:1]
    axes.set_title(f"{names[0] if len(names) == 1 else 'Fastest rival'}: TTFT over CacheSlide's")
    axes.axhline(1.0, color=GREY, lw=0.9, ls=":")
    highest = 1.2
    for k, row in enumerate(rows):
        e = row["advantage"]
        if e is None:
            continue
        axes.plot(k, e["value"], "o", color=BLUE, ms=6)
        error_bar(axes, k, e["value"], BLUE, up=(e["low"], e["high"]))
        if len(names) > 1:
            at = (k, e["high"] or e["value"])
            axes.annotate(names[k], at, (0, 5), textcoords="offset points", fontsize=6.5, color=GREY, ha="center")
        highest = max(highest, e["high"] or e["value"])
    axes.set_xticks(range(len(rows)), [str(r["n"]) for r in rows])
    axes.set(ylim=(0, 1.15 * highest), xlim=(-0.6, len(rows) - 0.4), xlabel=label)
