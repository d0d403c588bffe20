"""Loads begin before vLLM's worker prepares its step, once, and only where there are any."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.v1.worker.gpu_worker import Worker

from cacheslide.vllm.connector import CacheSlideConnector
from cacheslide.vllm.guard import Faults
from cacheslide.vllm.protocol import StepPlan
from cacheslide.vllm.worker import early_start

pytestmark = pytest.mark.slow


class WorkerSide:
    """Writes down what it is asked."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked, self.error = [], error
        self.loads = SimpleNamespace(begin=lambda step: self.asked.append("claims"))

    def begin(self, step):
        self.asked.append("begin")

    def load(self, step):
        self.asked.append("load")
        if self.error:
            raise self.error

    def load_nothing(self, step):
        self.asked.append("nothing")


def connector(error: Exception | None = None) -> CacheSlideConnector:
    made = CacheSlideConnector.__new__(CacheSlideConnector)
    made.worker, made.faults, made._begun, made._connector_metadata = WorkerSide(error), Faults(), None, None
    return made


def as_vllm_does(made: CacheSlideConnector, step: StepPlan) -> None:
    """What a step's forward asks of a connector, in its order."""
    made.bind_connector_metadata(step)
    made.start_load_kv(None)
    assert made._get_connector_metadata() is step
    made.clear_connector_metadata()


@pytest.fixture
def group(monkeypatch):
    """The connector that a worker of this process has."""
    made = connector()
    monkeypatch.setattr(early_start, "has_kv_transfer_group", lambda: True)
    monkeypatch.setattr(early_start, "get_kv_transfer_group", lambda: made)
    return made


def test_a_load_is_done_once(group):
    step = StepPlan(loads=["a load"])
    early_start.begin_loads(step)
    assert group.worker.asked == ["claims", "begin", "load"]
    as_vllm_does(group, step)
    assert group.worker.asked == ["claims", "begin", "load"]
    as_vllm_does(group, StepPlan(loads=["the next step's, which nobody has begun"]))
    assert group.worker.asked[3:] == ["claims", "begin", "load"]


def test_a_step_without_loads_waits_for_vllm(group):
    step = StepPlan()
    early_start.begin_loads(step)
    assert not group.worker.asked
    as_vllm_does(group, step)
    assert group.worker.asked == ["claims", "begin", "load"]


def test_a_load_that_fails_is_not_tried_again(monkeypatch):
    made, step = connector(ValueError("of the load")), StepPlan(loads=["a load"])
    made.begin_loads(step)
    as_vllm_does(made, step)
    assert made.worker.asked == ["claims", "begin", "load", "nothing"] and made.faults.total == {"start_load_kv": 1}


@pytest.mark.parametrize("step", [None, SimpleNamespace(loads=["of another connector"])])
def test_other_connectors_are_left_alone(monkeypatch, step):
    monkeypatch.setattr(early_start, "has_kv_transfer_group", lambda: True)
    monkeypatch.setattr(early_start, "get_kv_transfer_group", lambda: object())
    early_start.begin_loads(step)
    monkeypatch.setattr(early_start, "has_kv_transfer_group", lambda: False)
    monkeypatch.setattr(early_start, "get_kv_transfer_group", lambda: pytest.fail("there is none"))
    early_start.begin_loads(step)


def test_workers_begin_loads_first(monkeypatch):
    order = []
    monkeypatch.setattr(Worker, "execute_model", lambda self, output: order.append(output) or "its output")
    monkeypatch.setattr(early_start, "begin_loads", lambda step: order.append(step))
    early_start.install()
    early_start.install()
    output = SimpleNamespace(kv_connector_metadata="the plan")
    assert Worker.execute_model(object(), output) == "its output" and order == ["the plan", output]
