"""Figure 13: throughput in every second under a constant load, and its spread."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from harness.plots.style import GREY, error_bar, look, new_figure, nothing, remark
from harness.plots.task_labels import agents_in, of_task
from harness.results.agent_load import series_table
from harness.results.runs import read_file


def load(path: str | Path) -> list[dict[str, Any]]:
    """The table of a record file, each row with the agents of its episodes."""
    file = read_file(path)
    return [row | {"agents": agents_in(file)} for row in series_table(file)]


def draw(table: list[dict[str, Any]]) -> Figure:
    """Left: completions per second of every system, slices in sequence. Right: mean rate and σ."""
    figure = new_figure(11.0, 4.6)
    if not table:
        nothing(figure.add_subplot(), "no throughput over time was measured")
        return figure
    left, right = figure.subplots(1, 2, width_ratios=(5, 3))
    title = f"Requests completed in every second, {table[0]['concurrent']} agents at work{remark(table)}"
    left.set_title(of_task(title, table[0].get("agents", ())))
    for i, row in enumerate(table):
        style, at = look(row["system"], row["title"]), 0
        for k, part in enumerate(row["slices"]):
            label = style.label if not k else None
            xs = [at + j + 0.5 for j in range(len(part))]
            left.plot(xs, part, color=style.colour, ls=style.line, lw=1.3, marker=style.marker, ms=3, label=label)
            at += len(part) + 1
        e = row["rate"]
        right.barh(i, e["value"], 0.6, color=style.colour, alpha=0.75)
        error_bar(right, e["value"], i, "black", across=(e["low"], e["high"]))
        right.text(
            1.02,
            i,
            f"{e['value']:.1f} ± {row['std']:.1f}",
            va="center",
            fontsize=8,
            transform=right.get_yaxis_transform(),
        )
    left.set(ylim=(0, None), xlabel="seconds (gaps: the other systems' turns)", ylabel="1/s")
    left.legend(ncols=3, fontsize=7.5, loc="lower left")
    right.set_yticks(range(len(table)), [look(r["system"], r["title"]).label for r in table])
    right.set(ylim=(len(table) - 0.5, -0.5), xlabel="requests a second, 95 % interval; right: mean ± σ")
    right.grid(axis="y", visible=False)
    right.set_title("Mean and spread over seconds")
    note = "slices hold the same work for every system, which take turns; the last second of a slice is left out of σ"
    figure.supxlabel(note, fontsize=8, color=GREY, x=0.01, ha="left")
    return figure
