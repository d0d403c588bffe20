"""Figure 4b: F1 by reasoning round with the updated text padded or cut to a window, against no window."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from harness.plots.style import BLACK, BLUE, GREY, ORANGE, SKY, VERMILLION, new_figure, nothing
from harness.plots.task_labels import agents_in, of_task
from harness.results.agents import windows_table
from harness.results.runs import read_file

ENDS = ("low", "high")
COLOURS = (SKY, ORANGE, VERMILLION)


def load(path: str | Path) -> dict[str, Any]:
    """The table of a record file, with the agents of its episodes."""
    file = read_file(path)
    return windows_table(file) | {"agents": agents_in(file)}


def draw(table: dict[str, Any]) -> Figure:
    """Left: F1 by round, one line per variant. Right: F1 over all rounds."""
    figure = new_figure(11.0, 4.3)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    if not table or not table["rows"]:
        nothing(left, "no windows were measured")
        right.set_axis_off()
        return figure
    title = f"F1 by reasoning round: {table['episodes']} episodes of about {table['tokens']:,.0f} tokens"
    left.set_title(of_task(title, table.get("agents", ())))
    looks = _looks(table["windows"])
    names, total = [], len(table["rows"])
    for i, row in enumerate(table["rows"]):
        colour, line, name = looks.get(row["system"], (GREY, "-", row["title"]))
        xs = [r["round"] for r in row["rounds"]]
        left.plot(
            xs, [r["f1"]["value"] for r in row["rounds"]], line, color=colour, marker="o", ms=4, lw=1.4, label=name
        )
        if row["system"] in ("recompute", "naive_reuse"):
            ends = [[r["f1"][k] if r["f1"][k] is not None else r["f1"]["value"] for r in row["rounds"]] for k in ENDS]
            left.fill_between(xs, *ends, color=colour, alpha=0.12, lw=0)
        e = row["f1"]
        right.barh(i, e["value"], 0.62, color=colour, alpha=0.45 if line == "--" else 0.9)
        if e["low"] is not None:
            right.plot([e["low"], e["high"]], [i, i], color=BLACK, lw=1.2)
        right.text(1.02, i, f"{e['value']:.2f}", va="center", fontsize=8, transform=right.get_yaxis_transform())
        names.append(name)
    left.set(ylim=(-0.03, 1.06), xlabel="reasoning round (model call of the episode)", ylabel="F1 of the call")
    left.xaxis.get_major_locator().set_params(integer=True)
    right.set_yticks(range(total), names)
    right.set(xlim=(0, 1), ylim=(total - 0.5, -0.5), xlabel="F1 over all rounds, 95 % interval")
    right.grid(axis="y", visible=False)
    right.set_title("All rounds")
    note = "windows scaled down with the prompts: " + ", ".join(
        f"{w} tokens for {k}K" for k, w in enumerate(table["windows"], 1)
    )
    figure.supxlabel(
        f"{note} · dashed: the padded prompt computed in full · bands: 95 % intervals",
        fontsize=8,
        color=GREY,
        x=0.01,
        ha="left",
    )
    return figure


def _looks(windows: list[int]) -> dict[str, tuple[str, str, str]]:
    """Colour, line and name of every variant."""
    out = {"recompute": (BLACK, "-", "no window, recompute"), "naive_reuse": (BLUE, "-", "no window, same reuse")}
    for w, colour in zip(windows, COLOURS * len(windows), strict=False):
        out[f"window@{w}"] = (colour, "-", f"window of {w}")
        out[f"window_recompute@{w}"] = (colour, "--", f"window of {w}, recomputed")
    return out
