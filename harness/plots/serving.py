"""TTFT and throughput inside vLLM by prompt length and system, and the executor's efficiency against the ideal."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.plots.style import BLACK, GREY, ORANGE, new_figure, nothing, remark
from harness.results.runs import read_json

_BLUES = ("#9ecae1", "#6baed6", "#2f7ebc", "#0b3c6f")  # from the smallest share to the largest


def load(path: str | Path) -> dict[str, Any]:
    """The run of a serving file with the largest table; `others` are its runs of other shapes."""
    runs = read_json(path)["runs"]
    main = max(runs, key=lambda run: len(run["table"]))
    return main | {"others": [r for r in runs if r["settings"]["shape"] != main["settings"]["shape"]]}


def draw(run: dict[str, Any]) -> Figure:
    """Top: TTFT of one request, chunks on the GPU and in host memory. Bottom: batch throughput, efficiency."""
    figure = new_figure(11.0, 7.6)
    panels = figure.subplots(2, 2)
    table = run["table"]
    batches = sorted({r["batch"] for r in table})
    for axes, store, where in zip(panels[0], ("model", "cpu"), ("on the GPU", "in pinned host memory"), strict=True):
        rows = [r for r in table if r["batch"] == batches[0] and (r["store"] == store or "compute_fraction" not in r)]
        axes.set_title(f"TTFT of one request, chunks {where}{remark(rows)}")
        _lines(axes, rows, lambda r: r["ttft_ms"]["value"], "ms", log=True)
    last = batches[-1]
    rows = [r for r in table if r["batch"] == last and r["store"] == "model"]
    panels[1][0].set_title(f"First tokens a second, {last} requests at once, chunks on the GPU{remark(rows)}")
    _lines(panels[1][0], rows, lambda r: r["requests_per_s"], "1/s", log=True)
    panels[1][1].set_title("Executor efficiency (ideal over measured TTFT)")
    rows = [r for r in table if "efficiency" in r and r["store"] == "model" and r["batch"] == batches[0]]
    _lines(panels[1][1], rows, lambda r: r["efficiency"]["value"], "", log=False)
    for other in run.get("others", ()):
        _beside(panels[1][1], other)
    panels[1][1].axhline(0.8, color=GREY, lw=0.8, ls=":")
    gpus = run["provenance"]["gpus"]
    where = f", {len(gpus)} x {gpus[0]['name']}" if gpus else ""
    note = (
        f"{run['settings']['shape']}, random weights, {run['engine']['dtype'].removeprefix('torch.')}{where}; medians; "
    )
    note += "a batch counts until its last first token"
    figure.supxlabel(note, fontsize=7.5, color=GREY, x=0.01, ha="left")
    return figure


def _lines(axes: Axes, rows: list[dict[str, Any]], value, label: str, log: bool) -> None:
    if not rows:
        nothing(axes, "not measured")
        return
    shares = sorted({r["system"] for r in rows if r["system"].startswith("cacheslide@")}, key=_share)
    looks = {"recompute": ("Recompute", BLACK, "s"), "prefix_cache_ideal": ("Prefix cache, 90 % shared", GREY, "P")}
    looks |= {s: (f"CacheSlide, top-k {_share(s):.0%}", _BLUES[min(i, 3)], "o") for i, s in enumerate(shares)}
    for system, (name, colour, marker) in looks.items():
        own = sorted((r for r in rows if r["system"] == system), key=lambda r: r["tokens"])
        if own:
            width = 2.0 if system == "cacheslide@0.26" else 1.2
            xs, ys = [r["tokens"] for r in own], [value(r) for r in own]
            axes.plot(xs, ys, marker=marker, ms=5, lw=width, color=colour, label=name)
    lengths = sorted({r["tokens"] for r in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("prompt (tokens)")
    axes.set_ylabel(label)
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.05)
    axes.legend(fontsize=7.5)


def _beside(axes: Axes, run: dict[str, Any]) -> None:
    """Another shape's efficiency at top-k 26 %, chunks on the GPU."""
    rows = [r for r in run["table"] if (r["system"], r["store"], r["batch"]) == ("cacheslide@0.26", "model", 1)]
    if rows:
        label = f"{run['settings']['shape']}, TP={run['engine']['tensor_parallel_size']}, top-k 26%"
        xs, ys = [r["tokens"] for r in rows], [r["efficiency"]["value"] for r in rows]
        axes.plot(xs, ys, "*", ms=11, color=ORANGE, label=label)
        axes.legend(fontsize=7.5)


def _share(system: str) -> float:
    return float(system.split("@")[1])
