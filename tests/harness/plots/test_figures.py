"""Figures: written, not empty, the same byte for byte, and drawn from whatever a run holds."""

import re
from itertools import pairwise
from xml.etree.ElementTree import fromstring

import matplotlib as mpl
import pytest
from PIL import Image

from cacheslide.errors import DataError
from harness.plots import (
    fig03,
    fig04a,
    fig04b,
    fig05,
    fig10,
    fig11,
    fig13,
    fig14,
    frontier,
    labels,
    style,
    throughput,
    turns,
)
from harness.plots.render import FIGURES, render
from harness.plots.svg import compact
from harness.results.runs import Run, read_json
from harness.results.summary import build_summary, summarize
from tests.helpers import made_run
from tests.helpers.made_agents import SYSTEMS as AGENTS_SYSTEMS
from tests.helpers.made_figures import SYSTEMS, figure_sources

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The result file of every figure."""
    return figure_sources(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_written_and_repeatable(name, sources, tmp_path):
    kinds = ("svg", "pdf", "png")
    for folder in "ab":
        render(name, sources[name], [tmp_path / folder / f"{name}.{kind}" for kind in kinds])
    for kind in kinds:
        first, second = ((tmp_path / folder / f"{name}.{kind}").read_bytes() for folder in "ab")
        assert first == second, f"{name}.{kind} differs between two runs"
        assert len(first) > 5000
    assert sorted(p.suffix for p in (tmp_path / "a").iterdir()) == [".pdf", ".png", ".svg"]
    image = Image.open(tmp_path / "a" / f"{name}.png").convert("L")
    assert image.width > 900
    assert image.getextrema()[0] < 40 and image.getpixel((1, 1)) == 255
    svg = (tmp_path / "a" / f"{name}.svg").read_text()
    assert "<dc:date>" not in svg and "<image" not in svg
    assert len(svg) < 200_000 and svg == compact(svg)


SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"


def _drawn(svg: str) -> list[tuple]:
    """What an SVG draws, in order: tag, marker, numbers of its place, style (an element's own or inherited), text."""
    out: list[tuple] = []

    def walk(node, style):
        style = node.get("style") or (style if node.tag == SVG + "use" or node.tag == SVG + "g" else None)
        if node.tag in (SVG + "use", SVG + "path", SVG + "text"):
            turn = node.get("transform") or ""
            place = " ".join([node.get("d") or "", node.get("x") or "", node.get("y") or "", turn])
            numbers = [float(n) for n in re.findall(r"-?[0-9]+[.]?[0-9]*", "" if "rotate(-0" in turn else place)]
            out.append((node.tag, node.get(LINK), style, node.get("clip-path"), node.text, numbers))
        for child in node:
            walk(child, style)

    walk(fromstring(svg), None)
    return out


@pytest.mark.parametrize("name", ["fig03", "fig05", "fig10", "wca"])
def test_a_compact_svg_draws_what_matplotlib_wrote(name, sources, tmp_path):
    module = FIGURES[name]
    with mpl.rc_context(style.RC):
        module.draw(module.load(sources[name])).savefig(tmp_path / "full.svg", metadata=style.METADATA["svg"])
    full = (tmp_path / "full.svg").read_text()
    small = compact(full)
    before, after = _drawn(full), _drawn(small)
    assert len(small) < 0.9 * len(full) and len(before) == len(after) > 50
    for was, now in zip(before, after, strict=True):
        assert (was[0], was[1], was[3], (was[4] or "").strip()) == (now[0], now[1], now[3], (now[4] or "").strip())
        assert was[2] == now[2]
        assert not was[5] or was[5] == pytest.approx(now[5], abs=0.0051)


def test_group_opacity_stays_on_each_marker():
    markers = '<use xlink:href="#m" x="1" y="2" style="{}"/>\n' * 4
    shared, own = markers.format(*["fill-opacity: 0.5"] * 4), markers.format(*["opacity: 0.5"] * 4)
    assert compact(shared).count("opacity") == 1 and compact(own) == own


def _said(figure) -> str:
    texts = [t.get_text() for a in figure.axes for t in a.texts]
    legends = [t.get_text() for box in figure.legends for t in box.get_texts()]
    return " | ".join([*texts, *legends, figure.get_supxlabel()])


def test_figures_show_cope_where_it_was_measured_and_say_where_not(tmp_path):
    cfg, paths = made_run.make_run(tmp_path, {"systems": SYSTEMS}, prompts_each=5)
    modules = {fig04a: paths["cksim"], fig05: paths["prompts"], fig10: str(tmp_path / "summary.json")}
    summarize(cfg, tmp_path / "summary.json", **paths)
    for module, source in modules.items():
        said = _said(module.draw(module.load(source)))
        assert re.search("not measured in this run|no answers on a CoPE model|CoPE: this run has no adapter", said)
        assert "CCPE" not in said
    cfg, paths = made_run.add_cope(tmp_path, cfg, paths)
    summarize(cfg, tmp_path / "summary.json", **paths)
    for module, wanted in ((fig04a, "CCPE"), (fig05, "mean 0.5 positions"), (fig10, "CacheSlide-CoPE")):
        figure = module.draw(module.load(modules[module]))
        assert wanted in _said(figure) and "not measured in this run" not in _said(figure)
    assert "CacheSlide-RoPE" in _said(figure) and "CoPE is not timed" in _said(figure)
    assert len(fig04a.draw(fig04a.load(paths["cksim"])).axes) == 3


def test_the_frontier_draws_every_setting_and_says_what_is_missing(sources):
    result = read_json(sources["frontier"])
    assert {frontier.curve_of(r["line"]) for r in result["rows"]} == {n for c in frontier.PANELS.values() for n in c}
    figure = frontier.draw(result)
    drawn = [line for axes in figure.axes for line in axes.lines if line.get_label()[0] != "_"]
    assert sum(len(line.get_xdata()) for line in drawn) == len(result["rows"])
    assert "ledger task" in figure.get_suptitle() and "3 training seeds, n = 4" in figure.get_suptitle()
    assert "INCOMPLETE" not in figure.get_suptitle()
    result["models"][1] |= {"complete": False, "prompts": 2}
    assert "n = 2 to 4" in frontier.title_of(result) and "INCOMPLETE: seed-1" in frontier.title_of(result)


def test_figures_of_an_empty_run_say_so():
    empty = build_summary(Run({}))
    plain = ((frontier, {}), (fig03, {}), (fig04a, []), (fig05, {}), (fig10, empty), (throughput, []))
    agents = ((fig04b, {}), (fig11, []), (fig13, []), (fig14, {}), (turns, []))
    for module, results in (*plain, *agents):
        figure = module.draw(results)
        assert any(
            "was measured" in t.get_text() or "were measured" in t.get_text() for a in figure.axes for t in a.texts
        )


def test_unknown_figure_or_source_is_one_line(tmp_path):
    with pytest.raises(DataError, match="known: fig03"):
        render("fig99", tmp_path / "x.json", [])
    with pytest.raises(DataError, match="does not exist"):
        render("fig03", tmp_path / "x.json", [])
    with pytest.raises(DataError, match="not JSON"):
        (tmp_path / "x.json").write_text("{")
        render("fig03", tmp_path / "x.json", [])


def test_every_system_looks_different():
    looks = {(v.colour, v.marker, v.filled, v.line) for v in style.LOOKS.values()}
    assert len(looks) == len(style.LOOKS)
    grey = {(v.marker, v.filled, v.line) for v in style.LOOKS.values()}
    assert len(grey) >= len(style.LOOKS) - 1  # promotion aside, print tells them apart without colour
    assert style.look("some_new_system", "New") == style.look("some_new_system", "New")
    assert style.look("some_new_system", "New").label == "New"


def test_pareto_front():
    def at(x, y):
        return fig10.Point("s", "s", x, y, None, (None, None))

    front = fig10.pareto([at(3, 0.9), at(1, 0.2), at(2, 0.5), at(2, 0.4), at(4, 0.9), at(2.5, 0.3)])
    assert [(p.x, p.y) for p in front] == [(1, 0.2), (2, 0.5), (3, 0.9)]
    assert fig10.steps(front) == ([1, 2, 2, 3, 3], [0.2, 0.2, 0.5, 0.5, 0.9])


def test_systems_that_failed_the_gate_are_named_not_drawn(sources):
    summary = read_json(sources["fig10"])
    for row in summary["latency"]:
        if row["system"] == "cacheblend":
            row["ttft_ratio"] = None
    texts = [[t.get_text() for t in axes.texts] for axes in fig10.draw(summary).axes]
    assert sum("CacheBlend" in t for t in texts) == 2 + 3  # the two mixes and the three agents only
    assert sum(any(s.startswith("not shown") and "CacheBlend" in s for s in t) for t in texts) == 2


def test_labels_do_not_overlap(sources):
    """In every panel of figure 10, with points as close as CacheSlide and its variants are."""
    figure = fig10.draw(read_json(sources["fig10"]))
    renderer = labels.FigureCanvasAgg(figure).get_renderer()
    for axes in (a for a in figure.axes if a.axison):
        boxes = [t.get_window_extent(renderer) for t in axes.texts if not t.get_text().startswith("not shown")]
        assert len(boxes) == len(AGENTS_SYSTEMS if "episodes" in axes.get_xlabel() else SYSTEMS)
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def test_spread_keeps_order_and_gap():
    out = labels.spread([1.0, 1.01, 1.02, 5.0], gap=0.5, low=0.0, high=6.0)
    assert out == sorted(out) and all(b - a >= 0.5 - 1e-9 for a, b in pairwise(out))
    tight = labels.spread([3.0] * 5, gap=10.0, low=0.0, high=4.0)
    assert tight == pytest.approx([0.0, 1.0, 2.0, 3.0, 4.0])
    assert labels.spread([], 1, 0, 1) == []
