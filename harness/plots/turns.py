"""Accuracy by turn as history is appended; cost and gain of exact re-encoding every k generations."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.inventory import AGENT_NAMES
from harness.plots.labels import spread
from harness.plots.style import BLACK, BLUE, GREY, VERMILLION, error_bar, look, new_figure, nothing
from harness.plots.task_labels import of_task
from harness.results.agents import turns_table
from harness.results.runs import read_file

RETAINED = {"naive_reuse": VERMILLION, "cacheslide_first_turn": BLUE}


def load(path: str | Path) -> list[dict[str, Any]]:
    """The table of a record file."""
    return turns_table(read_file(path))


def draw(table: list[dict[str, Any]]) -> Figure:
    """One row per agent: right calls by turn for every system; right calls over late turns against retention cost."""
    agents = list(dict.fromkeys(r["agent"] for r in table))
    figure = new_figure(11.5, max(3.0, 4.4 * len(agents)))
    if not agents:
        nothing(figure.add_subplot(), "no turns were measured")
        return figure
    grid = figure.subplots(len(agents), 2, squeeze=False, width_ratios=(3, 2))
    figure.get_layout_engine().set(w_pad=0.12)
    for axes, agent in zip(grid, agents, strict=True):
        own = [r for r in table if r["agent"] == agent]
        _by_turn(axes[0], [r for r in own if "@" not in r["system"]], agent)
        _retained(axes[1], own)
    note = "teacher-forced; right: the system makes the recorded call · k: corrected KV is retained k generations, then"
    figure.supxlabel(f"{note} encoded exactly (0: always exact, ∞: never)", fontsize=8, color=GREY, x=0.01, ha="left")
    return figure


def _by_turn(axes: Axes, rows: list[dict[str, Any]], agent: str) -> None:
    axes.set_title(of_task(f"{AGENT_NAMES.get(agent, agent)}: right calls by turn, exact chunks", [agent]))
    ends = {}
    for row in rows:
        style = look(row["system"], row["title"])
        xs, ys = [t["turn"] for t in row["turns"]], smooth([t["right"]["value"] for t in row["turns"]])
        axes.plot(xs, ys, style.line, lw=1.2, ms=0.6 * style.size, **style.points)
        if row["system"] in ("recompute", "cacheslide"):
            low, high = (
                smooth(
                    [t["right"][k] if t["right"][k] is not None else y for t, y in zip(row["turns"], ys, strict=True)]
                )
                for k in ("low", "high")
            )
            axes.fill_between(xs, low, high, color=style.colour, alpha=0.12, lw=0)
        if xs:
            ends[row["system"]] = (xs[-1], ys[-1], style)
    axes.set(ylim=(-0.03, 1.05), xlabel="turn", ylabel="right calls (mean of 3 turns)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    edge = axes.get_xlim()[1]
    width = 0.03 * (edge - axes.get_xlim()[0])
    axes.set_xlim(axes.get_xlim()[0], edge)
    for (x, y, style), at in zip(ends.values(), spread([e[1] for e in ends.values()], 0.062, 0.0, 1.03), strict=True):
        axes.plot([x, edge, edge + width], [y, y, at], color=style.colour, lw=0.6, alpha=0.7, clip_on=False, zorder=1)
        axes.text(edge + 1.2 * width, at, style.label, color=style.ink, fontsize=7.5, va="center")


def _retained(axes: Axes, rows: list[dict[str, Any]]) -> None:
    late = rows[0]["late_from"]
    axes.set_title(f"From turn {late} on, by what is computed")
    axes.set(ylim=(-0.03, 1.1), ylabel="right calls", xlabel="row-layers of serving and encoding / recompute")
    exact = next((r for r in rows if r["system"] == "recompute"), None)
    if exact and exact["late"]:
        axes.axhline(exact["late"]["value"], color=BLACK, lw=0.9, ls=":")
    if not any(r["late"] for r in rows):
        nothing(axes, f"no episode has {late} turns")
        return
    for system, colour in RETAINED.items():
        own = sorted((r for r in rows if r["system"].startswith(f"{system}@") and r["late"]), key=lambda r: _limit(r))
        if not own:
            continue
        xs, ys = [r["prefill"] + r["encode"] for r in own], [r["late"]["value"] for r in own]
        axes.plot(xs, ys, "-o", color=colour, ms=5, lw=1.2, label=look(system).label)
        for number, (x, r) in enumerate(zip(xs, own, strict=True)):
            error_bar(axes, x, r["late"]["value"], colour, up=(r["late"]["low"], r["late"]["high"]))
            k = _limit(r)
            never = k > r["generation"] and k >= 1000  # computes least: its label has room on the left
            axes.annotate(
                "k = ∞" if never else f"{k}",
                (x, r["late"]["value"]),
                (-4 if never else 4, (5, -11)[number % 2]),
                textcoords="offset points",
                fontsize=7.5,
                color=colour,
                ha="right" if never else "left",
            )
    for r in rows:
        if r["system"] in ("cacheslide", "recompute") and r["late"]:
            style = look(r["system"])
            axes.plot(
                r["prefill"] + r["encode"],
                r["late"]["value"],
                ls="none",
                ms=style.size,
                label=style.label,
                **style.points,
            )
    axes.margins(x=0.14)
    axes.legend(fontsize=7.5, loc="lower right")


def _limit(row: dict[str, Any]) -> int:
    return int(row["system"].split("@")[1])


def smooth(values: list[float]) -> list[float]:
    """Mean over each turn and its neighbours."""
    return [sum(values[max(0, i - 1) : i + 2]) / len(values[max(0, i - 1) : i + 2]) for i in range(len(values))]
