"""Every figure drawn from data of the stress task says so. Which figures these are follows from the data."""

import json
from pathlib import Path
from types import SimpleNamespace

import matplotlib as mpl
import pytest
from matplotlib.text import Text

from harness.agents.registry import AGENTS
from harness.plots import style
from harness.plots.render import FIGURES
from harness.report.paper import CLAIMS
from harness.report.verdicts import Basis
from harness.tasks.data import STRESS, family_of, synthetic_names
from harness.tasks.synthetic.world import MIXES
from tests.helpers.made_figures import figure_sources
from tests.helpers.places import ROOT

pytestmark = pytest.mark.slow

LABEL = "stress task"
NAMES = {n for n in synthetic_names() if family_of(n) == STRESS} | set(MIXES) | set(AGENTS)


class Noted(dict):
    """A result file's object that notes which of its members are read."""

    def __init__(self, of):
        super().__init__(of)
        self.read = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.read.add(key)
        return super().get(key, default)

    def _all(self):
        self.read |= self.keys()

    def items(self):
        self._all()
        return super().items()

    def values(self):
        self._all()
        return super().values()


def strings(value):
    """Every key and string in a JSON value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)
    elif isinstance(value, str):
        yield value


def is_stress(value) -> bool:
    """Whether a data set, mix, agent or trace ("deep@4") of the stress task is named in a JSON value."""
    return any(s.partition("@")[0] in NAMES for s in strings(value))


def drawn(module, source):
    """The figure of a result file, and whether what it reads is about the stress task."""
    path, loaded = Path(source), module.load(source)
    with mpl.rc_context(style.RC):
        if path.suffix == ".json":
            figure = module.draw(loaded := Noted(loaded))
            return figure, is_stress({k: loaded[k] for k in set(loaded.read) & loaded.keys()})
        return module.draw(loaded), any(is_stress(json.loads(line)) for line in path.read_text().splitlines())


def unlabelled(module, source) -> bool:
    """Whether the figure shows data of the stress task and does not say so."""
    figure, stress = drawn(module, source)
    return stress and not any(LABEL in text.get_text() for text in figure.findobj(Text))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return figure_sources(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def of_stress(sources):
    return {name for name, module in FIGURES.items() if drawn(module, sources[name])[1]}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_of_the_stress_task_says_so(name, sources):
    assert not unlabelled(FIGURES[name], sources[name])


def test_a_new_figure_without_the_label_is_noticed(sources):
    """Of a record file, of a summary, and one that reads only a part of the summary without such data."""

    def new(read, load):
        def draw(results):
            read(results)
            figure = style.new_figure(4, 3)
            figure.add_subplot().set_title("A new figure")
            return figure

        return SimpleNamespace(load=load, draw=draw)

    records, summary = FIGURES["turns"].load, FIGURES["fig10"].load
    assert unlabelled(new(lambda table: None, records), sources["turns"])
    assert unlabelled(new(lambda s: s["accuracy"], summary), sources["fig10"])
    assert unlabelled(new(lambda s: [*s.values()], summary), sources["fig12b"])
    assert not unlabelled(new(lambda s: s["orders"], summary), sources["fig12b"])


def test_the_data_tells_stress_and_other_figures_apart(of_stress):
    assert not of_stress & {"real", "fig03_real", "serving", "fig12a"}
    judged = {c.target for c in CLAIMS if c.basis is Basis.STRESS} & FIGURES.keys()
    assert judged and judged <= of_stress


def test_committed_figures_of_the_stress_task_say_so(of_stress):
    files = [p for p in (ROOT / "figures").glob("*/*.svg") if p.stem in of_stress]
    assert {p.parent.name for p in files} >= {"cpu", "slide"}
    assert not [p.name for p in files if LABEL not in p.read_text()]
