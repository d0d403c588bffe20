"""Figure 3 from recorded sessions: tokens by kind with their spread, turn by turn, and how far reused text moved."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cacheslide.analysis.kinds import KINDS
from harness.plots.style import BLACK, BLUE, GREY, ORANGE, SKY, new_figure, nothing
from harness.results.runs import read_json

load = read_json

NAMES = {
    "swe-agent": "SWE-Agent, old output left out",
    "swe-agent-full": "SWE-Agent, history in full",
    "reflexion-react": "Reflexion, ReAct",
    "reflexion-cot": "Reflexion, given context",
}
COLOURS = {"prefix": "#B8B8B8", "order_preserving": BLUE, "reordered": ORANGE, "new": "#EFEFEF"}
LABELS = {
    "prefix": "prefix of the turn before",
    "order_preserving": "seen before, in order",
    "reordered": "seen before, not in order",
    "new": "new",
}
SIZES = (0, 100, 2), (100, 500, 3.2), (500, 2000, 5.5), (2000, float("inf"), 9)  # tokens from, to; marker
INKS = GREY, BLUE  # the prefix; the prefix plus text reusable in order
EACH = 12  # most sessions that are drawn as one line each


def draw(results: dict[str, Any]) -> Figure:
    """Bars of mean shares with quartiles, a panel of shares by turn for each group, and shifts of reused text."""
    groups = dict(sorted(results["groups"].items(), key=lambda item: _rank(item[0])))
    groups = {name: own for name, own in groups.items() if own["share"]["prefix"]}
    figure = new_figure(7.6, 3.6 + 0.95 * max(1, len(groups)))
    if not groups:
        nothing(figure.add_subplot(), "no session has a second turn")
        return figure
    rows = figure.add_gridspec(3, 1, height_ratios=[0.52 * len(groups) + 0.5, 2.1, 0.38 * len(groups) + 0.5])
    members = {name: [s for s in results["sessions"] if s["group"] == name] for name in groups}
    _bars(figure.add_subplot(rows[0]), groups, members)
    panels = rows[1].subgridspec(1, len(groups), wspace=0.08)
    first = None
    for i, name in enumerate(groups):
        axes = first = figure.add_subplot(panels[i], sharey=first) if first else figure.add_subplot(panels[i])
        _by_turn(axes, members[name], name)
        axes.tick_params(labelleft=i == 0)
    _shifts(figure.add_subplot(rows[2]), members)
    return figure


def _name(group: str) -> str:
    return NAMES.get(group, group).replace(", ", ",\n")


def _rank(name: str) -> tuple[int, str]:
    known = list(NAMES)
    return (known.index(name) if name in known else len(known), name)


def _shares(session: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """For each turn after the first: prefix share, and that share plus the text reusable in order."""
    turns = session["turns"]
    tokens = np.maximum(1, np.array(turns["tokens"][1:], dtype=float))
    prefix = np.array(turns["prefix"][1:]) / tokens
    return prefix, prefix + np.array(turns["order_preserving"][1:]) / tokens


def _bars(axes: Axes, groups: dict[str, Any], members: dict[str, list[dict[str, Any]]]) -> None:
    axes.set_title("Tokens of a prompt by kind: means over turns; below, median and quartiles", pad=24)
    for i, (name, own) in enumerate(groups.items()):
        left = 0.0
        for kind in KINDS:
            share = own["share"][kind]
            edge = {"edgecolor": GREY, "linewidth": 0.5}
            axes.barh(i, share["mean"], 0.5, left, color=COLOURS[kind], label=LABELS[kind] if i == 0 else None, **edge)
            if share["mean"] >= 0.045:
                ink = "white" if kind == "order_preserving" else BLACK
                middle = left + share["mean"] / 2
                axes.text(middle, i, f"{100 * share['mean']:.0f} %", ha="center", va="center", color=ink, fontsize=8)
            left += share["mean"]
        for j, (shares, colour) in enumerate(zip(zip(*map(_shares, members[name]), strict=True), INKS, strict=True)):
            low, middle, high = np.quantile(np.concatenate(shares), (0.25, 0.5, 0.75))
            axes.plot([low, high], [i + 0.32 + 0.1 * j] * 2, color=colour, lw=1.8, solid_capstyle="butt", clip_on=False)
            axes.plot(middle, i + 0.32 + 0.1 * j, "|", color=colour, ms=6, mew=1.6, clip_on=False)
        note = f"{own['turns']} turns, {own['sessions']} sessions,\n{_tasks(own['tasks'])}"
        axes.text(1.015, i, note, va="center", fontsize=7.5, color=GREY, transform=axes.get_yaxis_transform())
    axes.set_yticks(range(len(groups)), [_name(name) for name in groups])
    axes.set(xlim=(0, 1), ylim=(len(groups) - 0.35, -0.5))
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f} %")
    axes.grid(axis="y", visible=False)
    box = axes.legend(loc="lower right", bbox_to_anchor=(1.3, 1.0), ncols=4, borderaxespad=0.1, columnspacing=1.2)
    box.set_in_layout(False)


def _tasks(n: int) -> str:
    return "one task" if n == 1 else f"{n} tasks"


def _signed(number: float) -> str:
    return f"{number:+.0f}".replace("-", "−") if round(number) else "0"


def _by_turn(axes: Axes, sessions: list[dict[str, Any]], name: str) -> None:
    """Prefix share and the gain of in-order reuse, by turn: one line per session, or median and quartiles."""
    prefix, both = zip(*(_shares(session) for session in sessions if len(session["turns"]["tokens"]) > 1), strict=True)
    for rows, colour in zip((both, prefix), reversed(INKS), strict=True):
        if len(rows) <= EACH:
            for row in rows:
                axes.plot(np.arange(2, len(row) + 2), row, color=colour, lw=1.1, alpha=0.75)
        else:
            columns = [[row[t] for row in rows if t < len(row)] for t in range(max(map(len, rows)))]
            low, middle, high = (np.array([np.quantile(c, q) for c in columns]) for q in (0.25, 0.5, 0.75))
            at = np.arange(2, len(columns) + 2)
            axes.fill_between(at, low, high, color=colour, alpha=0.22, lw=0)
            axes.plot(at, middle, color=colour, lw=1.4)
    axes.set_title(_name(name), fontsize=8.5)
    axes.set(ylim=(0, 1.03), xlabel="turn", xlim=(1.5, None))
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
    if axes.get_subplotspec().is_first_col():
        axes.set_ylabel("share: prefix (grey),\nand in order (blue)", fontsize=8)


def _shifts(axes: Axes, members: dict[str, list[dict[str, Any]]]) -> None:
    axes.set_title("How far text reused in order moved (a dot is a span, larger ones are longer)")
    rng = np.random.default_rng(0)
    for i, sessions in enumerate(members.values()):
        spans = np.array([span[1:3] for session in sessions for span in session["spans"] if span[3]], dtype=float)
        if not len(spans):
            axes.text(0.01, i, "none", va="center", color=GREY, fontsize=8, transform=axes.get_yaxis_transform())
            continue
        jitter = i + rng.uniform(-0.25, 0.25, len(spans))
        for least, most, size in SIZES:
            some = (spans[:, 0] >= least) & (spans[:, 0] < most)
            axes.plot(spans[some, 1], jitter[some], "o", ms=size, color=SKY, alpha=0.5, mec="none")
        order = np.argsort(spans[:, 1])
        weight = np.cumsum(spans[order, 0]) / spans[:, 0].sum()
        middle = spans[order, 1][np.searchsorted(weight, 0.5)]
        axes.plot(middle, i, "D", ms=5, color="white", mec=BLACK, mew=1.2, zorder=3)
        axes.text(
            1.015,
            i,
            f"median token: {_signed(middle)}",
            va="center",
            fontsize=7.5,
            color=GREY,
            transform=axes.get_yaxis_transform(),
        )
    axes.set_xscale("symlog", linthresh=10, linscale=0.6)
    ticks = {0: "0", 10: "10", 100: "100", 1000: "1k", 10_000: "10k"}
    named = sorted(
        {sign * at: ("−" if sign * at < 0 else "") + name for at, name in ticks.items() for sign in (1, -1)}.items()
    )
    axes.set_xticks([at for at, _ in named], [name for _, name in named])
    axes.minorticks_off()
    axes.set_yticks(range(len(members)), [_name(name) for name in members])
    axes.set(xlim=(-20_000, 20_000), ylim=(len(members) - 0.5, -0.5))
    axes.set_xlabel("tokens towards the end of the prompt (negative: towards its start)")
    axes.axvline(0, color=GREY, lw=0.8)
    axes.grid(axis="y", visible=False)
