"""Figures by name, the entry point of the workflow."""

from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import matplotlib as mpl

from cacheslide.errors import DataError
from harness.plots import (
    fig03,
    fig03_real,
    fig04a,
    fig04b,
    fig05,
    fig10,
    fig11,
    fig12a,
    fig12b,
    fig12c,
    fig12d,
    fig13,
    fig14,
    frontier,
    real,
    reproduction,
    serving,
    throughput,
    turns,
    wca,
)
from harness.plots.style import RC, save

FIGURES: dict[str, ModuleType] = {
    "fig03": fig03,
    "fig03_real": fig03_real,
    "fig04a": fig04a,
    "fig04b": fig04b,
    "fig05": fig05,
    "fig10": fig10,
    "fig11": fig11,
    "fig12a": fig12a,
    "fig12b": fig12b,
    "fig12c": fig12c,
    "fig12d": fig12d,
    "fig13": fig13,
    "fig14": fig14,
    "frontier": frontier,
    "real": real,
    "turns": turns,
    "throughput": throughput,
    "serving": serving,
    "reproduction": reproduction,
    "wca": wca,
}


def render(name: str, source: str | Path, outputs: Iterable[str | Path]) -> None:
    """Draw figure `name` from the result file `source` and write it to every path of `outputs`."""
    if name not in FIGURES:
        raise DataError(f"unknown figure {name!r} (known: {', '.join(FIGURES)})")
    if not Path(source).is_file():
        raise DataError(f"{name} reads {source}, which does not exist")
    module = FIGURES[name]
    with mpl.rc_context(RC):
        save(module.draw(module.load(source)), outputs)
