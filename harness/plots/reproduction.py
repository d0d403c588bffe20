"""The GPU reproduction: TTFT against divergence, parallel requests, rate over time, ratio x threshold, energy."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.experiments.serving.arms import Arm
from harness.plots.style import GREY, error_bar, look, new_figure, nothing, remark
from harness.results.runs import read_json

load = read_json
Row = Mapping[str, Any]
SHOWN = ("prefix_cache", "context_cache", "prompt_cache", "cacheblend", "epic", "naive_reuse", "cacheslide",
         "cacheslide_first", "cacheslide_mixed")  # fmt: skip
RATES = ("vllm", "cacheblend", "epic", "cacheslide", "cacheslide_mixed")
SAME_LOOK = {"prefix_cache": "vllm_prefix_cache", "prefix_cache_ideal": "vllm_prefix_cache"}
COLUMNS = 2


def draw(result: Row) -> Figure:
    """A panel of TTFT against divergence for every model, the other panels for the first."""
    runs = result["runs"]
    first = runs[0]
    panels: list[Callable[[Axes], None]] = [partial(_divergence, run) for run in runs]
    panels += [partial(p, first) for p in (_lengths, _parallel, _rate, _grid, _energy)]
    rows = math.ceil(len(panels) / COLUMNS)
    figure = new_figure(11.0, 3.7 * rows + 0.4)
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        panel(axes)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel("\n".join([*map(_about, runs), _quality(result)]), fontsize=7.5, color=GREY, x=0.01, ha="left")
    return figure


def _name(run: Row) -> str:
    return run["settings"]["shape"] or run["settings"]["model"]


def _about(run: Row) -> str:
    """Model, weights, machine, and how much of the plan is missing."""
    made, settings = run["provenance"] or {}, run["settings"]
    gpus = made.get("gpus") or []
    where = f"{settings['tensor_parallel']} x {gpus[0]['name']}" if gpus else settings["device"]
    weights = "random weights" if settings["shape"] else "checkpoint"
    late = f"; INCOMPLETE: {len(run['missing_cells'])} cells missing" if run["missing_cells"] else ""
    return f"{_name(run)}, {weights}, {settings['dtype']}, {where}{late}"


def _quality(result: Row) -> str:
    return f"Times: medians, 95 % intervals over turns. KL: {result['conditions']['kl']}, not of the timed model"


def _rows(run: Row, *axes: str) -> list[Row]:
    own = [r for r in run["ttft"] if r["axis"] in axes and r["prefix_caching"] and r["kind"] == "ttft"]
    reused = run["settings"]["base"]["reused"]
    return [r for r in own if r["reused"] == reused]


def _look(arm: str):
    system = Arm.parse(arm).system
    return look(SAME_LOOK.get(system, system))


def _divergence(run: Row, axes: Axes) -> None:
    """Figure 10: every system and ratio at the base point whose divergence was measured."""
    base = run["settings"]["base"]
    rows = [r for r in _rows(run, "base", "ratios") if r["tokens"] == base["tokens"] and r["kl"]]
    axes.set_title(f"TTFT against divergence, {_name(run)}, {base['tokens']} tokens{remark(rows)}")
    if not rows:
        nothing(axes, "no system with a known divergence was timed")
        return
    labelled = set()
    for r in sorted(rows, key=lambda r: r["system"]):
        style, ms, kl = _look(r["system"]), r["ttft_ms"], r["kl"]
        system = Arm.parse(r["system"]).system
        label = None if system in labelled else style.label
        labelled.add(system)
        error_bar(
            axes, ms["value"], kl["value"], style.colour, across=(ms["low"], ms["high"]), up=(kl["low"], kl["high"])
        )
        axes.plot(ms["value"], kl["value"], ls="none", ms=6, label=label, **style.points)
    if exact := next((r for r in _rows(run, "base") if r["system"] == "recompute"), None):
        axes.axvline(exact["ttft_ms"]["value"], color=GREY, lw=0.8, ls=":", label="Recompute's TTFT")
    axes.set(yscale="log", xlabel="TTFT (ms)", ylabel="KL from recompute (nats)")
    axes.legend(fontsize=6.5, ncols=2)


def _curves(axes: Axes, rows: Sequence[Row], x: str, name: Callable[[Row], str], label: str) -> None:
    """Recompute's TTFT over a system's, by `x`."""
    for system in SHOWN:
        own = sorted((r for r in rows if r["system"] == system and name(r) in r), key=lambda r: r[x])
        if own:
            style, xs = _look(system), [r[x] for r in own]
            for r in own:
                ratio = r[name(r)]
                error_bar(axes, r[x], ratio["value"], style.colour, up=(ratio["low"], ratio["high"]))
            axes.plot(
                xs, [r[name(r)]["value"] for r in own], ms=5, lw=1.1, ls=style.line, label=style.label, **style.points
            )
    if not axes.lines:
        nothing(axes, "not measured, or disturbed")
        return
    ticks = sorted({r[x] for r in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{t // 1024}k" if t >= 1024 else str(t) for t in ticks])
    axes.set_xticks([], minor=True)
    axes.axhline(1, color=GREY, lw=0.8, ls=":")
    axes.set(xlabel=label, ylabel="recompute's TTFT over the system's")
    axes.legend(fontsize=6.5, ncols=2)


def _lengths(run: Row, axes: Axes) -> None:
    rows = [r for r in _rows(run, "base", "tokens") if r["batch"] == run["settings"]["base"]["batch"]]
    axes.set_title(f"One request by length, {_name(run)}{remark(rows)}")
    _curves(axes, rows, "tokens", lambda r: "recompute_over_ttft", "prompt (tokens)")


def _parallel(run: Row, axes: Axes) -> None:
    """Figure 11: requests that arrive together; the paper's beam widths are batch sizes too."""
    base = run["settings"]["base"]["tokens"]
    rows = [r for r in _rows(run, "base", "batch") if r["tokens"] == base]
    axes.set_title(f"Requests that arrive together, mean TTFT, {base} tokens{remark(rows)}")
    several = lambda r: "recompute_over_mean_ttft" if r["batch"] > 1 else "recompute_over_ttft"  # noqa: E731
    _curves(axes, rows, "batch", several, "requests at once")


def _rate(run: Row, axes: Axes) -> None:
    """Figure 13: requests answered in every second of the closed loop with the most clients."""
    most = max((r["clients"] for r in run["servers"]), default=0)
    rows = [r for r in run["servers"] if r["clients"] == most and r["system"] in RATES and r["rate"]["per_second"]]
    axes.set_title(f"Requests answered a second, {most} clients, streaming server{remark(rows)}")
    if not rows:
        nothing(axes, "no server was measured for a second")
        return
    for r in rows:
        style, series = _look(r["system"]), r["rate"]["per_second"]
        spread = "" if r["rate"]["mean"] is None else f", {r['rate']['mean']:.1f} ± {r['rate']['deviation']:.1f}"
        axes.plot(range(len(series)), series, lw=1.2, ls=style.line, color=style.colour, label=style.label + spread)
    axes.set(xlabel="second of the load", ylabel="requests answered", ylim=(0, None))
    axes.legend(fontsize=6.5)


def _grid(run: Row, axes: Axes) -> None:
    """Figure 14: the paper's rule by recompute ratio and threshold."""
    rows = [r for r in run["ttft"] if r["kind"] == "grid" and "recompute_over_ttft" in r]
    axes.set_title("Recompute's TTFT over CacheSlide's")
    if not rows:
        nothing(axes, "not measured")
        return
    at = {(float(Arm.parse(r["system"]).system.rpartition("_")[2]), Arm.parse(r["system"]).ratio): r for r in rows}
    taus, ratios = (sorted({key[i] for key in at}) for i in (0, 1))
    values = [[at[t, x]["recompute_over_ttft"]["value"] if (t, x) in at else math.nan for x in ratios] for t in taus]
    axes.pcolormesh(values, cmap="viridis")
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            axes.text(j + 0.5, i + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=8,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2})  # fmt: skip
    axes.set_xticks([j + 0.5 for j in range(len(ratios))], [f"{x:g}" for x in ratios])
    axes.set_yticks([i + 0.5 for i in range(len(taus))], [f"{t:g}" for t in taus])
    axes.set(xlabel="recompute ratio", ylabel="threshold")
    axes.grid(False)


def _energy(run: Row, axes: Axes) -> None:
    """Joules a request, idle power's part in grey."""
    rows = [r for r in run["energy"] if r["system"] in ("recompute", *SHOWN)]
    axes.set_title(f"Energy of a request, requests back to back{remark(rows)}")
    if not rows:
        nothing(axes, "no GPU was read")
        return
    rows.sort(key=lambda r: r["joules"]["value"])
    for at, r in enumerate(rows):
        style, total = _look(r["system"]), r["joules"]
        axes.barh(at, total["value"], color=style.colour, alpha=0.85)
        axes.barh(at, total["value"] - r["joules_above_idle"]["value"], color=GREY, alpha=0.7)
        error_bar(axes, total["value"], at, "black", across=(total["low"], total["high"]))
    axes.set_yticks(range(len(rows)), [_look(r["system"]).label for r in rows])
    axes.set(xlabel=f"J a request (grey: at idle power, {rows[0]['idle_w']:.0f} W)")
