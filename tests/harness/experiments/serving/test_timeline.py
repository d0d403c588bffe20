"""When the parts of a request ran."""

import sys
import time
import types

import pytest

from harness.experiments.serving.timeline import ARRIVAL, Part, Timeline, medians


class Engine:
    """Takes a request in and steps twice."""

    def take(self):
        time.sleep(0.002)

    def step(self):
        return "stepped"


class Derived(Engine):
    """Inherits what is wrapped."""


@pytest.fixture
def parts():
    module = types.ModuleType("made_engine")
    module.Engine, module.Derived = Engine, Derived
    sys.modules["made_engine"] = module
    yield (
        Part(ARRIVAL, "made_engine:Engine", "take"),
        Part("step", "made_engine:Derived", "step", device=True),
        Part("absent class", "made_engine:Other", "step"),
        Part("absent module", "no_such_module:Engine", "step"),
        Part("absent method", "made_engine:Engine", "leave"),
    )
    del sys.modules["made_engine"]


def request(timeline: Timeline) -> list[dict]:
    with timeline.measuring():
        time.sleep(0.002)  # before the arrival: not part of the request
        engine = Derived()
        engine.take()
        assert engine.step() == engine.step() == "stepped"
    return timeline.calls


def test_times_count_from_the_arrival(parts):
    calls = request(Timeline(parts))
    assert [c["label"] for c in calls] == [ARRIVAL, "step", "step"]
    assert calls[0]["begin"] == 0 and calls[0]["end"] >= 2
    assert calls[0]["end"] <= calls[1]["begin"] <= calls[1]["end"] <= calls[2]["begin"]


def test_classes_are_left_as_they_were(parts):
    before = dict(vars(Engine)), dict(vars(Derived))
    timeline = Timeline(parts)
    with pytest.raises(KeyError), timeline.measuring():
        raise KeyError("of the request")
    request(timeline)
    assert (dict(vars(Engine)), dict(vars(Derived))) == before


def test_medians_sum_the_calls_of_a_label():
    first = [
        {"label": "a", "begin": 1.0, "end": 2.0, "device": []},
        {"label": "b", "begin": 3.0, "end": 4.0, "device": [5.0, 9.0]},
        {"label": "a", "begin": 6.0, "end": 9.0, "device": []},
    ]
    second = [{"label": "b", "begin": 5.0, "end": 8.0, "device": [7.0, 9.5]}]
    assert medians([first, second]) == [
        {"label": "a", "begin_ms": 1.0, "host_ms": 4.0, "calls": 2},
        {"label": "b", "begin_ms": 4.0, "host_ms": 2.0, "calls": 1.0, "device_begin_ms": 6.0, "device_end_ms": 9.25},
    ]
