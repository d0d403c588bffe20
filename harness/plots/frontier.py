"""F1 lost to recompute against compute on the ledger task: every system at its own best layer, over training seeds."""

from collections import defaultdict
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
# Panels; in each a line of settings, its colour, marker and label.
PANELS = {
    "context kept (RPDC)": {
        "Nothing recomputed": (BLUE, "o", "nothing recomputed"),
        "Canonical, nothing recomputed": (PURPLE, "o", "canonical chain, nothing"),
        "Stale positions": (GREY, "1", "stale positions, nothing recomputed"),
        "Random tokens": (GREY, "x", "control: random tokens"),
        "First tokens": (BLUE, "s", "first tokens"),
        "Overlap": (PURPLE, ">", "overlap: what updates speak of"),
        "Overlap, half first": (PURPLE, "<", "half first tokens, half overlap"),
        "Remembered": (VERMILLION, "s", "remembered deviation"),
        "Mixed, two thirds remembered": (VERMILLION, "H", "remembered and overlap (default: 15 %)"),
        "Budget, left": (ORANGE, "d", "until 50, 30 % of the deviation is left"),
        "Question-aware": (GREEN, "X", "what the question attends to*"),
        "CacheSlide, by K": (SKY, "v", "CacheSlide, by K*"),
        "CacheSlide as printed": (BLACK, "*", "CacheSlide as printed*"),
        "CacheSlide as printed, updated keys only": (BLACK, "P", "as printed, updated keys only*"),
    },
    "other systems": {
        "Isolated, nothing recomputed": (ORANGE, "o", "isolated (PIC), nothing recomputed"),
        "Isolated, remembered": (VERMILLION, "D", "isolated, remembered deviation"),
        "CacheBlend, by V": (ORANGE, "^", "CacheBlend, by V*"),
        "CacheBlend, by K": (ORANGE, "<", "CacheBlend, by K*"),
        "CacheBlend, gradual": (ORANGE, "s", "CacheBlend, gradual filtering*"),
        "CacheBlend, as its code": (ORANGE, "D", "CacheBlend, as its code*"),
        "CacheBlend, stale positions": (GREY, "2", "CacheBlend, stale positions*"),
        "EPIC": (GREEN, "P", "EPIC"),
        "ProphetKV": (GREEN, "8", "ProphetKV"),
        "Cache-Craft": (SKY, "p", "Cache-Craft, α = 0.5, 1, 2"),
        "KVComm": (PURPLE, "h", "KVComm"),
        "PromptCache": (BLACK, "d", "PromptCache"),
        "PromptCache, joint": (BLACK, "D", "PromptCache, joint, slots 16 to 256"),
        "ContextCache": (GREY, "P", "ContextCache"),
        "Reordered": (BLUE, "*", "updated text last, prefix caching"),
        "Window padding": (SKY, "X", "window padding, 96 to 512"),
        "Recompute": (BLACK, "s", "recompute"),
    },
}
APART = {"PromptCache, joint", "CacheBlend, as its code"}  # points that no line joins: nothing lies between them
TICKS = (0, 1, 3, 10, 30, 100)


def draw(result: dict[str, Any]) -> Figure:
    """Two panels of F1 points lost against the mean share of compute, with intervals; the front of all in both.

    The axis of points is linear up to one point and logarithmic beyond, with the best on top.
    """
    figure = new_figure(11.0, 8.4)
    rows = [r for r in result.get("rows") or () if r["loss_points"]]
    if not rows:
        nothing(figure.add_subplot(), "no frontier was measured")
        return figure
    grid = figure.subplots(1, 2, sharex=True, sharey=True)
    by_setting = {r["setting"]: r for r in rows}
    best = [by_setting[s] for s in result["front"] if s in by_setting]
    front = [(r["compute_fraction"], r["loss_points"]["value"]) for r in best]
    for axes, (title, curves) in zip(grid, PANELS.items(), strict=True):
        _panel(axes, [r for r in rows if curve_of(r["line"]) in curves], curves, front)
        axes.set_title(title)
        axes.set_xlabel("share of the prompt's tokens × layers computed")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, fontsize=7.5, columnspacing=1.0)
    grid[0].set_yscale("symlog", linthresh=1, linscale=0.6)
    grid[0].set_yticks(TICKS, [str(t) for t in TICKS])
    grid[0].minorticks_off()
    lowest = min(r["loss_points"]["low"] or 0.0 for r in rows)
    grid[0].set(xlim=(0, 1.03), ylim=(110, min(-0.6, 1.3 * lowest)), ylabel="F1 points lost to recompute")
    figure.suptitle(title_of(result), x=0.01, ha="left", fontsize=10)
    return figure


def title_of(result: dict[str, Any]) -> str:
    """What was measured: task, models, prompts, and which models are incomplete."""
    about, models = result["settings"], result["models"]
    prompts = sorted({m["prompts"] for m in models})
    count = f"{prompts[0]}" if len(prompts) == 1 else f"{prompts[0]} to {prompts[-1]}"
    seeds = f"{len(models)} training seed{'s' if len(models) > 1 else ''}"
    first = of_task("F1 lost and compute of every system", about["datasets"])
    measured = f"{first}: {seeds}, n = {count} prompts of about {about['tokens']} tokens each"
    missing = [m["model"] for m in models if not m["complete"]]
    late = f"\nINCOMPLETE: {', '.join(missing)}" if missing else ""
    return f"{measured}\n95 % intervals over seeds and prompts; * at the layer chosen on other prompts{late}"


def curve_of(line: str) -> str | None:
    """The curve of a line of settings: the longest of `PANELS` that it begins with."""
    known = [name for curves in PANELS.values() for name in curves]
    return max((name for name in known if line.startswith(name)), key=len, default=None)


def _panel(axes: Axes, rows: list[dict[str, Any]], curves: dict[str, tuple[str, str, str]], front: list) -> None:
    axes.plot(*zip(*front, strict=True), color=GREY, lw=5, alpha=0.25, drawstyle="steps-post", zorder=1)
    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        lines[curve_of(row["line"])].append(row)
    for name, (colour, marker, label) in curves.items():
        members = sorted(lines[name], key=lambda r: r["compute_fraction"])
        if not members:
            continue
        for r in members:
            lost = r["loss_points"]
            error_bar(axes, r["compute_fraction"], lost["value"], colour, up=(lost["low"], lost["high"]))
        xs, ys = [r["compute_fraction"] for r in members], [r["loss_points"]["value"] for r in members]
        style = {"lw": 0.0 if name in APART else 0.9, "zorder": 4 if marker in "x12" else 3}
        axes.plot(xs, ys, color=colour, marker=marker, ms=5.5, alpha=0.9, label=label, **style)
