"""Promotions and demands are counted for what they were."""

import pytest

from harness.rag.speculation import Speculation
from tests.helpers.rag import manager, prompts

pytestmark = pytest.mark.slow


class Preset:
    """A proxy that scores as it is told."""

    def __init__(self, values):
        self.values = values

    def scores(self, token_ids):
        return self.values


def speculation(values, most=2, place="placeholder", **more):
    made, sample = manager(**more), prompts()
    keys = made.encode(sample.passages[:2], "device") + made.encode(sample.passages[2:], place)
    return Speculation(made, keys, Preset(values), most)


def test_the_best_passages_off_the_device_are_promoted_once():
    one = speculation([9, 8, 1, 0, 3, 2])
    one.forecast([], 0, [0, 1])
    assert [(e["passage"], e["source"]) for e in one.events] == [(4, "placeholder"), (5, "placeholder")]
    one.forecast([], 2, [0, 1])
    assert [e["passage"] for e in one.events] == [4, 5, 2]  # 3 is worth nothing
    assert one.counts()["wasted_promotions"] == 3 and all(e["bytes"] > 0 for e in one.events)


def test_demands_are_hits_misses_or_resident():
    one = speculation([0, 0, 0, 0, 3, 2], place="cpu")
    one.forecast([], 2, [0])
    one.demand([1, 4, 3], 4)
    one.demand([4, 3], 8)
    outcomes = [(e["passage"], e["outcome"]) for e in one.events if e["kind"] == "demand"]
    assert outcomes == [(1, "resident"), (4, "hit"), (3, "miss"), (4, "resident"), (3, "resident")]
    counts = one.counts()
    assert (counts["promotions"], counts["hits"], counts["misses"], counts["wasted_promotions"]) == (2, 1, 1, 1)
    assert next(e for e in one.events if e.get("outcome") == "miss")["source"] == "cpu"


def test_a_promotion_that_left_the_device_before_its_demand_is_wasted():
    one = speculation([0, 0, 0, 0, 3, 0])
    free = one.manager.device.nbytes
    one = speculation([0, 0, 0, 0, 3, 0], device_bytes=int(free * 1.6))  # three chunks
    one.forecast([], 0, [])
    one.manager.bring(prompts().passages[:3])
    one.demand([4], 4)
    assert one.counts()["misses"] == 1 and one.counts()["wasted_promotions"] == 1


def test_without_promotions_nothing_is_forecast():
    one = speculation([0, 0, 0, 0, 3, 2], most=0)
    one.forecast([], 0, [])
    assert not one.events and one.counts()["promotions"] == 0
