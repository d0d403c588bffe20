"""Direct labels that stay clear of each other, of the points and of the frame."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import cos, hypot, pi, sin

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

from harness.plots.style import GREY

RADII = (11, 16, 24, 34, 46, 60, 78, 98)  # points from a marker's centre to its label's nearest edge
ANGLES = tuple(2 * pi * i / 16 for i in range(16))
LEADER = 15  # points beyond which a thin line ties the label to its marker
PAD = 1.5


@dataclass(frozen=True)
class Label:
    """Text for the marker at data coordinates (x, y)."""

    x: float
    y: float
    text: str
    colour: str
    bold: bool = False


Box = tuple[float, float, float, float]


def place(
    axes: Axes, labels: Sequence[Label], avoid: Sequence[Sequence[tuple[float, float]]] = (), size: float = 8
) -> None:
    """Draw `labels` where they overlap least. Call when the limits of `axes` and its layout are final.

    `avoid` holds polylines in data coordinates, such as intervals and the front, that labels should not cross.
    Crowded markers are placed first; the choice is greedy and then revised twice, so it is the same in every run.
    """
    if not labels:
        return
    figure = axes.figure
    renderer, scale = FigureCanvasAgg(figure).get_renderer(), figure.dpi / 72
    frame = axes.get_window_extent(renderer)
    at = [tuple(axes.transData.transform((n.x, n.y))) for n in labels]
    sizes = []
    for n in labels:
        probe = axes.text(0, 0, n.text, fontsize=size, weight="bold" if n.bold else "normal")
        extent = probe.get_window_extent(renderer)
        sizes.append((extent.width + 2 * PAD * scale, extent.height + 2 * PAD * scale))
        probe.remove()
    dots = [(x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale) for x, y in at]
    lines = [_sampled([axes.transData.transform(p) for p in line], 4 * scale) for line in avoid]
    marks = [p for line in lines for p in line]
    edge = (frame.x0, frame.y0, frame.x1, frame.y1)

    def options(i: int) -> list[tuple[float, Box]]:
        out = []
        for radius, angle in product(RADII, ANGLES):
            box = _box(at[i], sizes[i], radius * scale, angle)
            cost = radius / 6 + 400 * _outside(box, edge) + sum(60 for d in dots if _overlap(box, d))
            cost += sum(9.0 for p in marks if _inside(p, box))
            leader = _sampled([at[i], _nearest(box, at[i])], 3 * scale)
            cost += sum(
                60
                for j, d in enumerate(dots)
                if j != i and not _inside(at[i], d) and any(_inside(p, d) for p in leader)
            )
            out.append((cost, box))
        return out

    choices = [options(i) for i in range(len(labels))]
    crowd = [sum(hypot(a[0] - b[0], a[1] - b[1]) < 60 * scale for b in at) for a in at]
    order = sorted(range(len(labels)), key=lambda i: (-crowd[i], i))
    chosen: dict[int, Box] = {}
    for _ in range(4):
        for i in order:
            others = [(b, at[j]) for j, b in chosen.items() if j != i]
            chosen[i] = min(choices[i], key=lambda c, i=i, o=others: c[0] + _clash(c[1], at[i], o))[1]
    for i, n in enumerate(labels):
        _draw(axes, n, at[i], chosen[i], size, scale)


def _clash(box: Box, anchor: tuple[float, float], others: Sequence[tuple[Box, tuple[float, float]]]) -> float:
    """Cost of overlapping other labels, or of a leader through or across another label's."""
    cost, here = 0.0, _nearest(box, anchor)
    for other, end in others:
        cost += 500 * _overlap(box, other)
        there = _nearest(other, end)
        cost += 30 * _crosses(anchor, here, end, there)
        cost += 40 * any(_inside(p, other) for p in _sampled([anchor, here], 6))
        cost += 40 * any(_inside(p, box) for p in _sampled([end, there], 6))
    return cost


def _draw(axes: Axes, label: Label, anchor, box: Box, size: float, scale: float) -> None:
    back = axes.transData.inverted().transform
    near = _nearest(box, anchor)
    if hypot(near[0] - anchor[0], near[1] - anchor[1]) > LEADER * scale:
        (x0, y0), (x1, y1) = back(anchor), back(near)
        axes.plot([x0, x1], [y0, y1], color=GREY, lw=0.6, zorder=1.5, scalex=False, scaley=False)
    x, y = back(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))
    weight = "bold" if label.bold else "normal"
    axes.text(x, y, label.text, fontsize=size, color=label.colour, weight=weight, ha="center", va="center", zorder=6)


def _box(at: tuple[float, float], size: tuple[float, float], radius: float, angle: float) -> Box:
    """A box whose edge is `radius` from `at` in direction `angle`."""
    w, h = size
    x = at[0] + cos(angle) * (radius * 0.6 + w / 2)
    y = at[1] + sin(angle) * (radius * 0.6 + h / 2)
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _outside(box: Box, edge: Box) -> bool:
    return box[0] < edge[0] or box[1] < edge[1] or box[2] > edge[2] or box[3] > edge[3]


def _inside(p: tuple[float, float], box: Box) -> bool:
    return box[0] < p[0] < box[2] and box[1] < p[1] < box[3]


def _nearest(box: Box, p: tuple[float, float]) -> tuple[float, float]:
    return min(max(p[0], box[0]), box[2]), min(max(p[1], box[1]), box[3])


def _crosses(a, b, c, d) -> bool:
    def side(p, q, r) -> float:
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    return side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0


def _sampled(line: Sequence[Sequence[float]], step: float) -> list[tuple[float, float]]:
    """Points along a polyline, about `step` apart."""
    out = [(float(line[0][0]), float(line[0][1]))] if len(line) else []
    for (x0, y0), (x1, y1) in pairwise(line):
        n = max(1, int(hypot(x1 - x0, y1 - y0) / step))
        out += [(x0 + (x1 - x0) * i / n, y0 + (y1 - y0) * i / n) for i in range(1, n + 1)]
    return out


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near `wanted`, at least `gap` apart and within [low, high] where there is room; order is kept."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    if not order:
        return []
    gap = min(gap, (high - low) / max(1, len(order) - 1))
    out = dict.fromkeys(order, 0.0)
    below = low - gap
    for i in order:
        below = out[i] = max(wanted[i], below + gap)
    above = high + gap
    for i in reversed(order):
        above = out[i] = min(out[i], above - gap)
    return [out[i] for i in range(len(wanted))]
