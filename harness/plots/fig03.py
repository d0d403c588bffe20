"""Figure 3: reusable share of a prompt and its spread over prompts, for running agents and for data sets."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from harness.inventory import AGENT_NAMES
from harness.plots.style import BLACK, BLUE, GREY, new_figure, nothing
from harness.plots.task_labels import task_of
from harness.results.runs import read_json

load = read_json


def draw(results: dict[str, Any]) -> Figure:
    """One line per agent or data set: each prompt as a dot, the mean, and one standard deviation either side."""
    agents = results.get("agents", {})
    datasets = agents | results.get("datasets", {})
    figure = new_figure(6.6, 1.5 + 0.46 * max(1, len(datasets)))
    axes = figure.add_subplot()
    axes.set_title("Share of the prompt that is reusable")
    if not datasets:
        nothing(axes, "no prompts were measured")
        return figure
    rng = np.random.default_rng(0)
    for i, content in enumerate(datasets.values()):
        shares = np.array(content["reusable_share"], dtype=float)
        mean, sd = shares.mean(), shares.std(ddof=1) if len(shares) > 1 else 0.0
        jitter = i + rng.uniform(-0.2, 0.2, len(shares))
        axes.plot(shares, jitter, "o", ms=2.6, color=BLUE, alpha=0.35, mec="none", zorder=1)
        axes.plot([mean - sd, mean + sd], [i, i], color=BLACK, lw=2.2, solid_capstyle="butt", zorder=2)
        axes.plot(mean, i, "D", ms=6, color="white", mec=BLACK, mew=1.4, zorder=3)
        text = f"{100 * mean:.1f} ± {100 * sd:.1f} %  (n = {len(shares)})"
        axes.text(1.03, i, text, va="center", color=BLACK, transform=axes.get_yaxis_transform())
    if agents and len(agents) < len(datasets):
        axes.axhline(len(agents) - 0.5, color=GREY, lw=0.8, ls=":")
    axes.set_yticks(range(len(datasets)), [_named(name) for name in datasets])
    axes.set(xlim=(0, 1), ylim=(len(datasets) - 0.5, -0.5), xlabel="fixed tokens / all tokens")
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f} %")
    axes.grid(axis="y", visible=False)
    legend = "dot: one prompt · diamond and bar: mean ± standard deviation" + (" · top: agents" if agents else "")
    axes.text(0, 1.01, legend, fontsize=8, color=GREY, transform=axes.transAxes, va="bottom")
    axes.set_title("Share of the prompt that is reusable", pad=18)
    return figure


def _named(name: str) -> str:
    """An agent's or data set's name with its task."""
    title = AGENT_NAMES.get(name, name)
    return f"{title}\n({task_of(name)})" if task_of(name) else title
