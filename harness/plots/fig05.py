"""Figure 5: position index shift of cached keys against how far their segment moved, by placement."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from harness.plots.style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, look, new_figure, nothing
from harness.plots.task_labels import of_task
from harness.results.runs import read_json

COPE_FILE = "prompts_cope.json"  # beside the native model's
VARIANTS = {"cope": ("CoPE, live gates", BLACK, "+"), "ccpe": ("CCPE, the slot at its calibrated offset", BLACK, "x")}
COLOURS, MARKERS = (BLUE, ORANGE, PURPLE, SKY, GREEN, VERMILLION), "o^DXvp"


def load(path: str | Path) -> dict[str, Any]:
    """The moves of every prompt, with the CoPE model's where their file exists."""
    beside = Path(path).with_name(COPE_FILE)
    return read_json(path) | ({"cope": read_json(beside)["datasets"]} if beside.is_file() else {})


def draw(results: dict[str, Any]) -> Figure:
    """Every prompt as a point; systems whose keys sit at the same distances everywhere share a series."""
    figure = new_figure(8.2, 4.2)
    axes = figure.add_subplot()
    title = "How far cached keys are from where their rows sit now"
    axes.set_title(of_task(title, results.get("datasets", {})))
    moves = [m for content in results.get("datasets", {}).values() for m in content["moves"]]
    if not moves:
        nothing(axes, "no moves were measured")
        return figure
    moved = np.array([m["displacement"] for m in moves])
    reach = max(1.0, float(np.abs(moved).max()))
    line = np.linspace(-reach, reach, 201)
    axes.plot(line, np.abs(line), color=BLACK, lw=1.2, ls=":", zorder=1, label="left where the turn before had them")
    for i, (systems, shifts) in enumerate(_series(moves)):
        names = "\n".join(_wrapped([look(s, results.get("titles", {}).get(s, "")).label for s in systems]))
        axes.plot(
            moved, shifts, ls="none", marker=MARKERS[i % len(MARKERS)], ms=5, color=COLOURS[i % len(COLOURS)],
            alpha=0.55, mec="white", mew=0.4, zorder=3, label=f"{names}\nmean {np.mean(shifts):.3g} tokens",
        )  # fmt: skip
    of_cope = [m for content in results.get("cope", {}).values() for m in content["moves"]]
    for variant, (name, colour, marker) in VARIANTS.items():
        own = [(m["displacement"], m["shift"][variant]) for m in of_cope if variant in m["shift"]]
        if own:
            label = f"{name}\nmean {np.mean([y for _, y in own]):.3g} positions"
            axes.plot(*zip(*own, strict=True), ls="none", marker=marker, ms=5, color=colour, zorder=4, label=label)
    if not of_cope:
        axes.plot([], [], ls="none", label="CoPE: this run has no adapter")
    top = max([reach, *(max(s) for _, s in _series(moves))])
    axes.set_yscale("symlog", linthresh=10, linscale=0.7)
    ticks = [0, 5, 10, *(t for t in (20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000) if t <= 1.3 * top)]
    axes.set_yticks(ticks, [f"{t:,}" for t in ticks])
    axes.minorticks_off()
    axes.set(ylim=(-1.5, 1.6 * top), xlabel="displacement of the fixed segments between two turns (tokens)")
    axes.set_ylabel("position index shift |Δpos| (tokens; under CoPE positions)")
    axes.axhline(0, color=GREY, lw=0.6)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", labelspacing=1.1)
    return figure


def _series(moves: list[dict[str, Any]]) -> list[tuple[list[str], list[float]]]:
    """Systems with equal shifts on every prompt, smallest mean shift first."""
    systems = [s for s in moves[0]["shift"] if all(s in m["shift"] for m in moves)]
    groups: dict[tuple[float, ...], list[str]] = {}
    for system in systems:
        groups.setdefault(tuple(m["shift"][system] for m in moves), []).append(system)
    return [(names, list(key)) for key, names in sorted(groups.items(), key=lambda g: (sum(g[0]), g[1]))]


def _wrapped(names: list[str]) -> list[str]:
    """Two names a line."""
    return ["; ".join(names[i : i + 2]) for i in range(0, len(names), 2)]
