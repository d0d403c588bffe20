"""Figure 10: accuracy against cost. Above: accuracy prompts against row-layers computed. Below: measured TTFT."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.inventory import AGENT_NAMES
from harness.plots.labels import Label, place
from harness.plots.style import GREY, error_bar, look, new_figure, nothing, remark, shown_disturbed
from harness.plots.task_labels import of_task
from harness.results.runs import OURS, REFERENCE, read_json
from harness.systems import COPE

load = read_json
COLUMNS = 2


@dataclass(frozen=True)
class Point:
    """One system in one panel; `across` and `up` are its intervals."""

    system: str
    title: str
    x: float
    y: float
    across: tuple[float | None, float | None] | None
    up: tuple[float | None, float | None]


def draw(summary: dict[str, Any]) -> Figure:
    """Two panels per row: one for each mix, each timed length and each agent."""
    panels = [*_accuracy_panels(summary), *_latency_panels(summary), *_agent_panels(summary)]
    rows = max(1, math.ceil(len(panels) / COLUMNS))
    figure = new_figure(11.0, 4.1 * rows + 0.3)
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    drawn = []
    for axes, panel in zip(grid.flat, panels, strict=False):
        drawn.append((axes, _panel(axes, **panel)))
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    if not panels:
        nothing(grid.flat[0], "neither accuracy nor latency was measured")
    if panels:
        legend = (
            "dashed: Pareto front · thin lines: 95 % intervals over prompts · hollow: a variant of the filled system"
        )
        legend += f" · {_cope_note(panels)}"
        figure.supxlabel(legend, fontsize=8, color=GREY, x=0.01, ha="left")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # labels are placed for this layout
    for axes, points in drawn:
        _label(axes, points)
    return figure


def _cope_note(panels: list[dict[str, Any]]) -> str:
    if not any(p.system.endswith(COPE) for panel in panels for p in panel["points"]):
        return "this run has no answers on a CoPE model"
    return "CoPE is not timed: its attention is the plain reference here"


def _accuracy_panels(summary: dict[str, Any]) -> Iterable[dict[str, Any]]:
    rows = [r for r in summary["accuracy"] if r["scope"] == "mix" and r["questions"]]
    for mix in dict.fromkeys(r["name"] for r in rows):
        own = [r for r in rows if r["name"] == mix]
        prompts, tokens = max(r["prompts"] for r in own), max(r["tokens"] for r in own)
        yield {
            "title": of_task(f"{mix} mix: {prompts} prompts of about {tokens:,.0f} tokens", [mix]),
            "xlabel": "share of row-layers computed",
            "points": [
                Point(r["system"], r["title"], r["compute_fraction"], r["f1"]["value"], None, _ends(r["f1"]))
                for r in own
            ],
            "note": "",
        }  # fmt: skip


def _latency_panels(summary: dict[str, Any]) -> Iterable[dict[str, Any]]:
    rows = [r for r in summary["latency"] if r["prompts"]]
    device = str(summary["conditions"].get("device", "")).upper()
    dataset = summary["conditions"].get("config", {}).get("latency", {}).get("dataset")
    for tokens in dict.fromkeys(r["tokens"] for r in rows):
        own = [r for r in rows if r["tokens"] == tokens]
        good = [r for r in own if r["f1"] and (r["ttft_ratio"] or r["system"] == REFERENCE or shown_disturbed(r))]
        left_out = [look(r["system"], r["title"]).label for r in own if r not in good]
        ms = 1000.0
        yield {
            "title": of_task(
                f"{tokens:,} tokens, {device}: {max(r['prompts'] for r in own)} prompts{remark(good)}", [dataset]
            ),
            "xlabel": "TTFT (ms, median over prompts)",
            "points": [
                Point(
                    r["system"], r["title"], ms * r["ttft_median"]["value"], r["f1"]["value"],
                    tuple(None if e is None else ms * e for e in _ends(r["ttft_median"])), _ends(r["f1"]),
                )
                for r in good
            ],
            "note": f"not shown, no reuse or no answers: {', '.join(left_out)}" if left_out else "",
        }  # fmt: skip


def _agent_panels(summary: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Agents: TTFT on recorded turns, and the closed-loop score, or the share of right calls where that was not run."""
    rows = summary.get("agents", {}).get("replay", [])
    ms = 1000.0
    for agent in dict.fromkeys(r["agent"] for r in rows):
        own = [r for r in rows if r["agent"] == agent]
        good = [r for r in own if not r["ratio_reason"] or shown_disturbed(r)]
        key = "score" if all(r["score"] is not None for r in own) else "right"
        left_out = [look(r["system"], r["title"]).label for r in own if r not in good]
        about = f"{own[0]['episodes']} episodes, about {own[0]['tokens']:,.0f} tokens"
        yield {
            "title": of_task(f"{AGENT_NAMES.get(agent, agent)}: {about}{remark(good)}", [agent]),
            "xlabel": "TTFT (ms, median over episodes)",
            "ylabel": {"score": "solved share of a task", "right": "right calls on recorded turns"}[key],
            "points": [
                Point(
                    r["system"], r["title"], ms * r["ttft_median"]["value"], r[key]["value"],
                    tuple(None if e is None else ms * e for e in _ends(r["ttft_median"])), _ends(r[key]),
                )
                for r in good
            ],
            "note": f"not shown, no reuse on some turn: {', '.join(left_out)}" if left_out else "",
        }  # fmt: skip


def _ends(estimate: dict[str, Any]) -> tuple[float | None, float | None]:
    return estimate["low"], estimate["high"]


def pareto(points: Iterable[Point]) -> list[Point]:
    """The points with no better point at equal or smaller x, from left to right."""
    front: list[Point] = []
    for p in sorted(points, key=lambda p: (p.x, -p.y)):
        if not front or p.y > front[-1].y:
            front.append(p)
    return front


def steps(front: list[Point]) -> tuple[list[float], list[float]]:
    """The front as a staircase."""
    xs, ys = [front[0].x], [front[0].y]
    for p in front[1:]:
        xs += [p.x, p.x]
        ys += [ys[-1], p.y]
    return xs, ys


def _panel(axes: Axes, title: str, xlabel: str, points: list[Point], note: str, ylabel: str = "F1") -> list[Point]:
    axes.set_title(title)
    if not points:
        nothing(axes, note or "no system passed the gate")
        return []
    front = pareto(points)
    axes.plot(*steps(front), color=GREY, lw=1.3, ls=(0, (5, 2)), zorder=1)
    for p in points:
        style = look(p.system, p.title)
        error_bar(axes, p.x, p.y, style.colour, across=p.across, up=p.up)
        axes.plot(p.x, p.y, ls="none", ms=style.size, zorder=4, **style.points)
    reach = max([p.x for p in points] + [e for p in points if p.across for e in p.across if e is not None])
    axes.set(xlim=(-0.04 * reach, 1.12 * reach), ylim=(-0.06, 1.24), xlabel=xlabel, ylabel=ylabel)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    if note:
        axes.text(0.01, 0.015, note, transform=axes.transAxes, fontsize=7.5, color=GREY)
    return points


def _label(axes: Axes, points: list[Point]) -> None:
    labels, twins = [], any(p.system == f"{OURS}{COPE}" for p in points)
    for p in points:
        style, ours = look(p.system, p.title), p.system == OURS
        labels.append(Label(p.x, p.y, f"{style.label}-RoPE" if ours and twins else style.label, style.ink, ours))
    avoid = [list(zip(*steps(pareto(points)), strict=True))] if points else []
    for p in points:
        for ends, horizontal in ((p.across, True), (p.up, False)):
            if ends and None not in ends:
                avoid.append([(e, p.y) if horizontal else (p.x, e) for e in ends])
    place(axes, labels, avoid)
