"""Style of the figures: one colour, marker and short name per system; output files are reproducible byte for byte.

Colours are Okabe and Ito's, distinct for colour-blind readers. Each system also has its own marker, hollow or filled
for variants of one system, so that a grey print is readable.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from cacheslide.errors import DataError
from harness.plots.svg import compact

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#6B6B6B"

RC = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana"],  # equal widths, so that an SVG's text keeps its place
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": 160,
    "svg.fonttype": "none",
    "svg.hashsalt": "cacheslide",
    "pdf.fonttype": 42,
    "path.simplify": True,
}
METADATA: dict[str, dict[str, Any]] = {
    "svg": {"Date": None, "Creator": "CacheSlide"},
    "pdf": {"CreationDate": None, "ModDate": None, "Creator": "CacheSlide", "Producer": "Matplotlib"},
    "png": {"Software": "CacheSlide"},
}


@dataclass(frozen=True)
class Look:
    """Colour, marker and name of one system."""

    label: str
    colour: str
    marker: str
    filled: bool = True
    line: str = "-"

    @property
    def ink(self) -> str:
        """The colour for text: darkened, since light text is hard to read."""
        return to_hex([0.72 * c for c in to_rgb(self.colour)])

    @property
    def size(self) -> float:
        """Marker size; larger for stars, and for hollow markers, which ring a filled marker at the same place."""
        return 9.5 if self.marker == "*" or not self.filled else 7.5

    @property
    def points(self) -> dict[str, Any]:
        """Keyword arguments of `Axes.plot` for its marker."""
        face = self.colour if self.filled else "none"
        return {
            "color": self.colour,
            "marker": self.marker,
            "markerfacecolor": face,
            "markeredgecolor": self.colour,
            "markeredgewidth": 1.4,
        }


LOOKS = {
    "recompute": Look("Recompute", BLACK, "s"),
    "vllm": Look("vLLM", BLACK, "s", False, "--"),
    "vllm_prefix_cache": Look("vLLM, prefix cache", GREY, "P", False, "--"),
    "context_cache": Look("ContextCache", GREY, "P"),
    "reorder": Look("Reordered", GREY, "X", False),
    "prompt_cache": Look("PromptCache", PURPLE, "D"),
    "prompt_cache_joint": Look("PromptCache, joint", PURPLE, "D", False, "--"),
    "cacheblend": Look("CacheBlend", ORANGE, "^"),
    "cacheblend_stale": Look("CacheBlend, stale", ORANGE, "^", False, "--"),
    "cacheblend_gradual": Look("CacheBlend, gradual", ORANGE, "p"),
    "cacheblend_code": Look("CacheBlend, as its code", ORANGE, "p", False, "--"),
    "epic": Look("EPIC", GREEN, "v"),
    "epic_stale": Look("EPIC, stale", GREEN, "v", False, "--"),
    "kvcomm": Look("KVComm", PURPLE, "h", False, "-."),
    "prophetkv": Look("ProphetKV", GREEN, "8", False, "-."),
    "cache_craft": Look("Cache-Craft", ORANGE, "p", False, "-."),
    "window_padding": Look("Window padding", SKY, "X"),
    "naive_reuse": Look("Naive reuse", GREY, "d", False, ":"),
    "cacheslide": Look("CacheSlide", BLUE, "o"),
    "cacheslide_first_turn": Look("CacheSlide, first turn", BLUE, "o", False, "--"),
    "cacheslide_promote": Look("CacheSlide, promotion", VERMILLION, "*"),
    "cacheslide_first": Look("CacheSlide, first tokens", SKY, "<"),
    "cacheslide_remember": Look("CacheSlide, remembered", BLUE, "h"),
    "cacheslide_overlap": Look("CacheSlide, first + overlap", PURPLE, ">"),
    "cacheslide_mixed": Look("CacheSlide, remembered + overlap", VERMILLION, "H"),
    "cacheslide_cope": Look("CacheSlide-CoPE", VERMILLION, "o", False, ":"),
    "recompute_cope": Look("Recompute, CoPE", BLACK, "s", False, ":"),
    "naive_reuse_cope": Look("Naive reuse, CoPE", VERMILLION, "d", False, ":"),
}
_SPARE_COLOURS = (SKY, PURPLE, GREEN, ORANGE, VERMILLION, GREY)
_SPARE_MARKERS = ("p", "h", "<", ">", "8", "H")


def look(system: str, title: str = "") -> Look:
    """The look of `system`; an unlisted system gets a hollow marker derived from its name, the same in every figure."""
    if system in LOOKS:
        return LOOKS[system]
    seed = crc32(system.encode())
    colour, marker = _SPARE_COLOURS[seed % 6], _SPARE_MARKERS[seed // 6 % 6]
    return Look(title or system, colour, marker, False, "-.")


def shown_disturbed(row: Mapping[str, Any]) -> bool:
    """Whether a row lacks a ratio only because too few timings were undisturbed; such rows are drawn with `remark`."""
    return bool(row.get("disturbed")) and row.get("ratio_reason", row.get("disturbed")) == row["disturbed"]


def remark(rows: Iterable[Mapping[str, Any]]) -> str:
    """A title's remark on rows timed in disturbed blocks; empty without such rows."""
    return "\nDISTURBED TIMINGS, no result" if any(row.get("disturbed") for row in rows) else ""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` by `height` inches in the house style, tied to no window."""
    with mpl.rc_context(RC):
        return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, outputs: Iterable[str | Path]) -> None:
    """Write `figure` to every path, in the format of its suffix, without dates."""
    for path in map(Path, outputs):
        kind = path.suffix.removeprefix(".")
        if kind not in METADATA:
            raise DataError(f"{path}: figures are written as {', '.join(METADATA)}")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.stem}.part{path.suffix}")
        try:
            with mpl.rc_context(RC):
                figure.savefig(part, format=kind, metadata=METADATA[kind])
            if kind == "svg":
                part.write_text(compact(part.read_text(encoding="utf-8")), encoding="utf-8")
            part.replace(path)
        except OSError as full:
            part.unlink(missing_ok=True)
            raise DataError(f"cannot write {path}: {full}") from None


def nothing(axes: Axes, reason: str) -> None:
    """Print the reason in an empty panel."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", va="center", color=GREY, wrap=True)


def error_bar(
    axes: Axes, x: float, y: float, colour: str, *, across: Sequence | None = None, up: Sequence | None = None
):
    """Thin interval lines through (x, y); `across` and `up` are (low, high), either end may be None."""
    for ends, horizontal in ((across, True), (up, False)):
        if ends and None not in ends:
            xs, ys = ([ends[0], ends[1]], [y, y]) if horizontal else ([x, x], [ends[0], ends[1]])
            axes.plot(xs, ys, color=colour, lw=1.0, alpha=0.75, solid_capstyle="butt", zorder=2)
