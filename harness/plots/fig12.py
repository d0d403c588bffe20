"""Figures 12a-d: layer latency by load-write order, write stalls, bytes written, GPU pages against PromptCache."""

from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.plots.style import BLUE, GREEN, GREY, ORANGE, PURPLE, error_bar, new_figure, nothing
from harness.plots.task_labels import of_task

POLICIES = {"clean-first": BLUE, "lru": ORANGE, "fifo": GREEN}
ORDERS = {"locked": ORANGE, "relocate": PURPLE, "disjoint": BLUE}
WIDTH = 0.26


def _bars(
    axes: Axes, groups: list[str], series: dict[str, list[dict[str, Any] | None]], colours: dict[str, str]
) -> None:
    """Grouped bars of estimates (value, low, high) with their intervals."""
    for k, (name, values) in enumerate(series.items()):
        for i, e in enumerate(values):
            if e is None or e["value"] is None:
                continue
            x = i + (k - (len(series) - 1) / 2) * WIDTH
            axes.bar(x, e["value"], WIDTH * 0.92, color=colours[name], label=name if i == 0 else None)
            error_bar(axes, x, e["value"], "black", up=(e["low"], e["high"]))
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def draw_a(summary: dict[str, Any]) -> Figure:
    """12a: milliseconds per layer."""
    figure = new_figure(8.2, 3.8)
    axes = figure.add_subplot()
    measured = summary["orders"]["cuda"] or summary["orders"]["cpu"]
    if measured is None:
        nothing(axes, "the load-write orders were not measured")
        return figure
    where = "on a GPU" if measured["device"] == "cuda" else "on the CPU: no claim about a GPU"
    axes.set_title(f"Latency of a layer by load-write order, chunks in host memory, {where}")
    rows = [r for r in measured["rows"] if r["source"] == "host"]  # loads from files are slower by orders of magnitude
    cells = sorted({(r["staging"], r["batch"]) for r in rows})
    found = {(r["staging"], r["batch"], r["order"]): _scaled(r["layer_s"], 1e3) for r in rows}
    names = [f"batch {b}\n" + ("load with the layer" if s == 1 else f"{s - 1} layer ahead") for s, b in cells]
    _bars(axes, names, {o: [found.get((*c, o)) for c in cells] for o in ORDERS}, ORDERS)
    axes.set_ylabel("ms a layer (median)")
    return figure


def _scaled(estimate: dict[str, Any], by: float) -> dict[str, Any]:
    return {k: None if estimate[k] is None else estimate[k] * by for k in ("value", "low", "high")}


def _volume(summary: dict[str, Any], what: str, by: float, title: str, unit: str) -> Figure:
    figure = new_figure(9.6, 3.8)
    axes = figure.add_subplot()
    measured = sorted(summary["conditions"].items(), key=lambda c: not c[0].startswith("main"))  # the main ones first
    cells = {c: v for c, v in measured if v is not None}
    axes.set_title(of_task(title, (t for v in cells.values() for t in v.get("traces", ()))))
    if not cells:
        nothing(axes, "no run was measured")
        return figure
    series = {p: [_scaled(v["policies"][p][what], by) for v in cells.values()] for p in POLICIES}
    timed = what.endswith("_s")
    names = [f"{c}, disturbed" if timed and v.get("disturbed") else c for c, v in cells.items()]
    _bars(axes, [fill(name, 13) for name in names], series, POLICIES)
    axes.set_ylabel(unit)
    return figure


def draw_b(summary: dict[str, Any]) -> Figure:
    """12b: seconds of write stalls."""
    return _volume(summary, "stall_s", 1.0, "Waiting for write-back, by eviction order", "stall (s a run)")


def draw_c(summary: dict[str, Any]) -> Figure:
    """12c: bytes written to disk."""
    return _volume(summary, "bytes_written", 2**-20, "Bytes written to disk by eviction order", "MiB written a run")


def draw_d(summary: dict[str, Any]) -> Figure:
    """12d: GPU pages against PromptCache, computed from page counts."""
    figure = new_figure(8.2, 3.8)
    rows = summary["gpu_pages_computed"]
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("one template", "a template each"), strict=True):
        axes.set_title(of_task(f"Requests on {kind}", [r.get("trace") for r in rows or ()]))
        if not rows:
            nothing(axes, "no trace was recorded")
            continue
        mine = [r for r in rows if r["requests_on"] == kind]
        for key, label, colour, line in (
            ("prompt_cache_copies", "PromptCache, a copy a request", PURPLE, "-"),
            ("prompt_cache_shared", "PromptCache, shared pages", GREY, ":"),
            ("cacheslide", "CacheSlide", BLUE, "-"),
        ):
            axes.plot(
                [r["batch"] for r in mine], [r[key] for r in mine], color=colour, ls=line, marker="o", label=label
            )
        axes.set_xlabel("batch")
    figure.axes[0].set_ylabel("pages in GPU memory (computed)")
    figure.axes[0].legend()
    return figure
