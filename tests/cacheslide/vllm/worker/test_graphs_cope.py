"""Replayed layers of CoPE models on the CPU: position tables, calibrated slots, and room for any other attention."""

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("vllm")

from cacheslide.core.selective_prefill import SelectivePrefill
from cacheslide.policies.edges import EdgeTokens
from cacheslide.policies.first_tokens import FirstTokens
from cacheslide.policies.none import NoCorrection
from cacheslide.positions.ccpe import NOWHERE, PromptSlots
from cacheslide.vllm.worker import cope_rows
from cacheslide.vllm.worker.attention import RowKernel
from cacheslide.vllm.worker.cope_rows import SlotRoom
from cacheslide.vllm.worker.graph_rows import Size, StaticRows
from cacheslide.vllm.worker.graphs import RECORD_AT
from tests.helpers.checkpoints import save_random_adapter
from tests.helpers.cope_served import CopeServed
from tests.helpers.graphed import BATCHES, Served, everything, graphed, poisoned
from tests.helpers.graphed_cope import KINDS, assert_same
from tests.helpers.requests import requests

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    return save_random_adapter(tmp_path_factory.mktemp("adapter"), checkpoint, tables=1.0)


@pytest.fixture(params=KINDS)
def served(request, checkpoint, adapter) -> CopeServed:
    return CopeServed.made(checkpoint, adapter, *KINDS[request.param])


@pytest.fixture
def calibrated(checkpoint, adapter) -> CopeServed:
    return CopeServed.made(checkpoint, adapter, *KINDS["calibrated"])


@contextmanager
def all_poisoned(monkeypatch):
    """NaN in padded rows, and padding that claims to cross slots of requests that are not there."""
    plain = SlotRoom.fill

    def fill(self, groups) -> None:
        plain(self, groups)
        rows = sum(len(g.rows) for g in groups)
        assert not self.canonical[rows:].any() and (self.bounds[len(groups) * self.most :] == NOWHERE).all()
        self.canonical[rows:] = True
        self.bounds[len(groups) * self.most :] = torch.tensor([0, 4], dtype=torch.int32)

    with monkeypatch.context() as patch, poisoned(monkeypatch):
        patch.setattr(SlotRoom, "fill", fill)
        yield


@pytest.mark.parametrize("rules", BATCHES.values(), ids=BATCHES)
def test_replayed_layers_equal_launched_ones(served, rules, monkeypatch):
    made = requests(served, rules)
    want = everything(SelectivePrefill(served).run(made), made)
    graphs, recorder = graphed(served)
    with all_poisoned(monkeypatch):
        for _ in range(RECORD_AT + 1):
            made = requests(served, rules)
            assert_same(everything(SelectivePrefill(served, graphs).run(made), made), want)
    assert graphs.replayed == 2 and graphs.eager == {"first of its size": 1} and recorder.recorded == 5
    [size] = graphs.recorded
    assert size.variant == ("slots" if served.attend_paged.offsets.known else "")


def test_one_recording_serves_every_batch_of_its_size(calibrated, monkeypatch):
    """Slots elsewhere, or none in some requests: what the run before left must not show."""
    graphs, recorder = graphed(calibrated, met=defaultdict(lambda: RECORD_AT))
    batches = [([FirstTokens(0.3), EdgeTokens(2, 2)], s) for s in ((5, 8), (6, 9), (7, 2))]
    batches += [([NoCorrection(), FirstTokens(0.1), None], (4, 8, 1)), ([FirstTokens(0.25)] * 2, (3, 3))]
    with all_poisoned(monkeypatch):
        for number, (rules, seeds) in enumerate(batches):
            made, again = requests(calibrated, rules, seeds), requests(calibrated, rules, seeds)
            for of in (made, again) if number % 2 else ():
                of[0].kv.updated = None
            got = everything(SelectivePrefill(calibrated, graphs).run(made), made)
            assert_same(got, everything(SelectivePrefill(calibrated).run(again), again))
    assert graphs.replayed == 5 and recorder.recorded == 5 * len(graphs.recorded) < 25


def test_slots_matter_and_runs_without_take_the_launch_without(calibrated):
    graphs, _ = graphed(calibrated, met=defaultdict(lambda: RECORD_AT))
    left = []
    for slots in (True, False):
        made = requests(calibrated, [EdgeTokens(2, 2)])
        if not slots:
            made[0].kv.updated = None
        left.append(everything(SelectivePrefill(calibrated, graphs).run(made), made)[0])
    assert sorted(size.variant for size in graphs.recorded) == ["", "slots"] and graphs.replayed == 2
    assert any((a - b).abs().max() > 1e-2 for a, b in zip(*left, strict=True) if a.is_floating_point())


def test_more_slots_than_there_is_room_for_are_launched(calibrated, monkeypatch):
    monkeypatch.setattr(cope_rows, "MOST_SLOTS", 2)
    graphs, recorder = graphed(calibrated)
    for _ in range(RECORD_AT + 1):
        made, again = requests(calibrated, [FirstTokens(0.2)]), requests(calibrated, [FirstTokens(0.2)])
        for [request] in (made, again):
            bounds = (*request.kv.updated.bounds, (40, 44), (50, 60))
            request.kv.updated = PromptSlots(bounds, request.kv.updated.canonical)
        got = everything(SelectivePrefill(calibrated, graphs).run(made), made)
        assert_same(got, everything(SelectivePrefill(calibrated).run(again), again))
    assert graphs.eager == {"slots": 3} and recorder.recorded == 0
    assert StaticRows.make(calibrated, 50).extras.most == 2  # and memory is bounded


def test_a_run_over_padding_alone_leaves_the_cache_as_it_is(calibrated):
    for layer in calibrated.paged:
        layer.cache.fill_(3.0)
    graphs, _ = graphed(calibrated)
    recorded = graphs._record(Size(64, 8, 16, "slots"))
    for layer in range(5):
        recorded.replay(layer)
    assert all((layer.cache[:-1] == 3.0).all() for layer in calibrated.paged)
    assert graphs.buffers.hidden.isfinite().all()


# --- another attention -----------------------------------------------------------------------------------------------


@dataclass
class Lengths:
    """Numbers of rows of a run's requests, repeated a row [n]: an attention's own input."""

    of_rows: torch.Tensor

    def at(self, rows: int, requests: int) -> "Lengths":
        return Lengths(self.of_rows[:rows])

    def clear(self) -> None:
        self.of_rows.zero_()

    def fill(self, groups) -> None:
        lengths = lengths_of(groups)
        self.of_rows[: len(lengths)].copy_(lengths)
        self.of_rows[len(lengths) :] = float("nan")


def lengths_of(groups) -> torch.Tensor:
    return torch.cat([torch.full((len(g.rows),), float(len(g.rows))) for g in groups])


class Scaled(RowKernel):
    """Row attention whose output shrinks with its request's rows."""

    def extras(self, groups) -> Lengths:
        return Lengths(lengths_of(groups))

    def launch(self, rows, cu_rows, table, scale, extras=None):
        attend = super().launch(rows, cu_rows, table, scale)

        def scaled(layer, q, cache, out):
            return attend(layer, q, cache, out).div_(1 + extras.of_rows[:, None, None] / 10)

        return scaled

    def variant(self, groups) -> str:
        return "scaled"

    def room(self, rows, requests, device) -> Lengths:
        return Lengths(torch.zeros(rows, device=device))


@pytest.mark.parametrize("rules", [[FirstTokens(0.3), None, EdgeTokens(2, 2)]], ids=["ragged"])
def test_another_attention_needs_nothing_of_the_graphs(checkpoint, rules):
    served = Served.from_pretrained(checkpoint)
    plain = everything(SelectivePrefill(served).run(made := requests(served, rules)), made)
    served.attend_paged = Scaled()
    made = requests(served, rules)
    want = everything(SelectivePrefill(served).run(made), made)
    assert not torch.allclose(want[0][0], plain[0][0])
    graphs, _ = graphed(served)
    for _ in range(RECORD_AT + 1):
        made = requests(served, rules)
        assert_same(everything(SelectivePrefill(served, graphs).run(made), made), want)
    assert graphs.replayed == 2
