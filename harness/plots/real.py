"""Divergence against compute on a real model: every system of the study, its interval, and the noise floor."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.experiments.real.arms import ASKED, NOISE, QUESTION
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
from harness.results.real_records import rule_and_layer
from harness.results.runs import read_json

load = read_json
SETTINGS = {
    "unrelated": "notes about something else",
    "matter": "notes hold a needed passage",
    "shift": "notes grow by 0.1k to 2k tokens",
    "contradict": "notes contradict the passages",
}
# Curves: prefix of the arm's name, up to its ratio; colour, marker, label.
CURVES = {
    "Nothing recomputed": (BLUE, "o", "context kept (RPDC), nothing recomputed"),
    "First tokens": (BLUE, "s", "CacheSlide, first tokens"),
    "Remembered": (VERMILLION, "s", "CacheSlide, remembered deviation"),
    "Overlap": (PURPLE, ">", "CacheSlide, what updates speak of"),
    "Question-aware": (PURPLE, "X", "CacheSlide, what the question attends to (chosen layer)"),
    "Shrinking": (SKY, "D", "CacheSlide, shrinking with depth"),
    "CacheSlide, by K": (SKY, "v", "CacheSlide, by K (layer 1, chosen layer)"),
    "CacheSlide as printed": (VERMILLION, "*", "CacheSlide as printed"),
    "CacheSlide as printed, updated": (VERMILLION, "P", "CacheSlide as printed, updated keys only"),
    "Random tokens": (GREY, "x", "control: random tokens"),
    "Canonical, nothing": (PURPLE, "D", "canonical chain (our default), nothing or first tokens"),
    "Canonical, first": (PURPLE, "D", "canonical chain (our default), nothing or first tokens"),
    "Canonical, remembered": (PURPLE, "s", "canonical chain, remembered deviation"),
    "Isolated": (ORANGE, "o", "isolated chunks (PIC), nothing or random"),
    "CacheBlend, by V": (ORANGE, "^", "CacheBlend, by V (layer 1, chosen layer)"),
    "CacheBlend, by K": (ORANGE, "<", "CacheBlend, by K² (likewise)"),
    "CacheBlend, gradual": (ORANGE, "s", "CacheBlend, gradual filtering (likewise)"),
    "CacheBlend, as its code": (ORANGE, "D", "CacheBlend, as its code (likewise)"),
    "EPIC": (GREEN, "P", "EPIC"),
    "PromptCache": (BLACK, "d", "PromptCache"),
    "PromptCache, joint": (BLACK, "D", "PromptCache, encoded jointly, slots of 16 to 256"),
    "Reordered": (GREEN, "*", "updated text last, prefix caching"),
    "Chain, stale": (GREY, "1", "stale positions"),
    "CacheBlend, stale": (GREY, "2", "CacheBlend, stale positions"),
}
VARIANTS = ("+ boundary", "half first")


def draw(summary: dict[str, Any]) -> Figure:
    """One panel per setting: mean KL on the answer (log scale) against the mean share of compute."""
    figure = new_figure(11.0, 8.6)
    names = [s for s in SETTINGS if any(r["key"][0] == s for r in summary["frontier"])]
    if not names:
        nothing(figure.add_subplot(), "no setting was measured")
        return figure
    grid = figure.subplots(2, 2, sharex=True, sharey=True, squeeze=False)
    handles: dict[str, Any] = {}
    best = {QUESTION: ASKED[0]} | (summary["conditions"]["frontier"].get("best") or {})
    for axes, name in zip(grid.flat, names, strict=False):
        rows = [r for r in summary["frontier"] if r["key"][:2] == [name, "both"] and shown(r["key"][2], best)]
        handles |= _panel(axes, name, rows)
    for axes in grid.flat[len(names) :]:
        axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel("share of the prompt's tokens × layers computed")
    for axes in grid[:, 0]:
        axes.set_ylabel("KL from recompute, nats a token")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    about = summary["conditions"]["frontier"]
    what = (
        f"{about['model']}, {about['dtype']}; means over prompts with 95 % intervals; hollow: over fewer prompts than n"
    )
    title = f"Divergence from recompute on real text: {what}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


def shown(arm: str, best: Mapping[str, int]) -> bool:
    """Whether a point is drawn: of the swept layers, only the first and the one chosen on the validation part.

    A variant ("as printed, updated keys only") has the layer of the rule that its name begins with.
    """
    rule, layer = rule_and_layer(arm)
    chosen = max((name for name in best if rule.startswith(name)), key=len, default=None)
    return layer in (None, 1, best.get(chosen))


def curve_of(arm: str) -> str | None:
    """The curve of an arm: the longest matching prefix of its name; None for variants, which only tables show."""
    if any(word in arm for word in VARIANTS):
        return None
    return max((c for c in CURVES if arm.startswith(c)), key=len, default=None)


def _panel(axes: Axes, setting: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    handles: dict[str, Any] = {}
    n = max(r["n"] for r in rows)
    axes.set(yscale="log", xlim=(0, 1.02), title=f"{setting}: {SETTINGS[setting]} (n = {n})")
    lines: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        arm = row["key"][2]
        if arm == NOISE:
            floor = row["answer"]["kl"]["value"]
            handles["noise floor: exact, other batching"] = axes.axhline(floor, color=BLACK, lw=1.2, ls=":")
        elif curve_of(arm) is not None:
            lines[rule_and_layer(arm)].append(row)
    for members in lines.values():
        # Points over fewer prompts are drawn only past the line's end: their means are of another set of prompts.
        reach = max((r["compute_fraction"] for r in members if 2 * r["n"] >= n), default=0)
        members = [r for r in members if 2 * r["n"] >= n or r["compute_fraction"] > reach]
        members.sort(key=lambda r: r["compute_fraction"])
        colour, marker, label = CURVES[curve_of(members[0]["key"][2])]
        for r in members:
            kl = r["answer"]["kl"]
            error_bar(axes, r["compute_fraction"], kl["value"], colour, up=(kl["low"], kl["high"]))
        xs, ys = [r["compute_fraction"] for r in members], [r["answer"]["kl"]["value"] for r in members]
        style = {"color": colour, "marker": marker, "ms": 5, "lw": 0.9, "alpha": 0.9, "zorder": 3}
        [handles[label]] = axes.plot(xs, ys, **style)
        few = [(x, y) for x, y, r in zip(xs, ys, members, strict=True) if 2 * r["n"] < n]
        if few:  # hollow: means over fewer prompts
            axes.plot(*zip(*few, strict=True), **style | {"lw": 0, "mfc": "white", "alpha": 1})
    return handles
