"""A fault while layers are recorded or replayed costs the recording: the run is launched, and right."""

import pytest
import torch

pytest.importorskip("vllm")

from cacheslide.core.active_tokens import ActiveTokens
from cacheslide.core.placement import Piece
from cacheslide.core.selective_prefill import SelectivePrefill
from cacheslide.policies.edges import EdgeTokens
from cacheslide.policies.first_tokens import FirstTokens
from cacheslide.vllm.worker.graph_rows import StaticRows, size_for
from cacheslide.vllm.worker.graphs import ENTRY
from cacheslide.vllm.worker.paged_source import Caches, PagedChunks
from cacheslide.vllm.worker.prefetch import LayerFetch
from harness.robustness.seams import ERRORS, GRAPH_SEAMS, raising
from tests.helpers.graphed import Served, everything, graphed
from tests.helpers.graphed_cope import assert_same
from tests.helpers.paged import rings_for
from tests.helpers.requests import requests

pytestmark = pytest.mark.slow

RULES = [FirstTokens(0.3), None, EdgeTokens(2, 2)]


@pytest.fixture
def served(checkpoint) -> Served:
    return Served.from_pretrained(checkpoint)


def poison(served) -> None:
    for layer in served.paged:
        layer.cache.fill_(float("nan"))


def runs(served, graphs, count: int, want) -> None:
    for _ in range(count):
        served.free = list(range(2000))
        poison(served)
        made = requests(served, RULES)
        assert_same(everything(SelectivePrefill(served, graphs).run(made), made), want)


@pytest.mark.parametrize("mode", ["once", "late", "always"])
@pytest.mark.parametrize("seam", GRAPH_SEAMS)
def test_a_fault_costs_the_recording_and_nothing_else(served, seam, mode):
    made = requests(served, RULES)
    want = everything(SelectivePrefill(served).run(made), made)
    graphs, _ = graphed(served)
    for error in ERRORS[:2]:
        graphs.forget()
        with raising(seam, mode, error, {}) as counts:
            runs(served, graphs, 4, want)
        assert counts.raised and graphs.faults.total[ENTRY] == counts.raised
        graphs.faults.total.clear()
    graphs.forget()
    runs(served, graphs, 3, want)  # as ever, when it is over
    assert graphs.replayed >= 2 and not graphs.faults.total


@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("done", [False, True], ids=["undone", "done"])
def test_layers_behind_a_replay_that_fails_are_launched_from_the_first(served, at, done):
    """Whatever has been written by then: all of it is written again."""
    made = requests(served, RULES)
    want = everything(SelectivePrefill(served).run(made), made)
    graphs, _ = graphed(served)
    runs(served, graphs, 2, want)
    replay, replayed = graphs.recorded[size := next(iter(graphs.recorded))].replay, []

    def failing(layer: int) -> None:
        replayed.append(layer)
        if layer < at or done:
            replay(layer)
        if layer == at:
            graphs.buffers.hidden.fill_(float("nan"))
            raise RuntimeError("a replay that fails")

    graphs.recorded[size].replay = failing
    runs(served, graphs, 2, want)
    assert replayed == list(range(at + 1)) and graphs.eager == {"first of its size": 1, "fault": 1, "not recorded": 1}
    assert graphs.faults.total == {ENTRY: 1} and graphs.failed == {size}


@pytest.mark.parametrize("at", [0, 2, 4])
def test_rows_that_have_come_from_the_host_stay_when_layers_are_launched_instead(served, at):
    """The ring holds the last layers only: the first ones' rows lie in the cache by now."""
    [plain] = requests(served, [FirstTokens(0.2)])
    want = everything(SelectivePrefill(served).run([plain]), [plain])
    graphs, _ = graphed(served)
    [request] = requests(served, [FirstTokens(0.2)])
    pieces = [Piece(p.chunk, p.length) for p in request.source.pieces]
    fetch = LayerFetch(pieces, 0, 5, rings_for(pieces, 5, group=2), group=2)
    placement = type("Placement", (), {"rotation": "delta"})()
    settings = pieces, request.positions[request.reused], placement, served.rotaries, torch.float32, 0
    request.source = PagedChunks(*settings, torch.device("cpu"), Caches(served.paged), fetch)
    state = ActiveTokens(request, served)
    recorded = graphs._record(size_for(len(state.active), 1, len(state.group.kv.table), graphs.most_blocks))
    replay = recorded.replay

    def failing(layer: int) -> None:
        if layer == at:
            raise OSError("a replay that fails")
        replay(layer)

    recorded.replay = failing
    got = everything(SelectivePrefill(served, graphs).run([request]), [request])
    assert graphs.eager == {"fault": 1}
    assert_same(got, want)


def test_a_source_that_fails_is_the_runs_own_fault(served):
    """Its rows cannot be placed twice: the load is done again, with sources of its own."""
    graphs, _ = graphed(served)
    for _ in range(2):
        made = requests(served, RULES)
        SelectivePrefill(served, graphs).run(made)
    made = requests(served, RULES)
    with raising("cacheslide.core.placement.PlacedChunks:layer", "once", OSError, {}), pytest.raises(OSError):
        SelectivePrefill(served, graphs).run(made)
    assert not graphs.faults.total and not graphs.failed


def test_recordings_go_even_if_the_device_cannot_be_waited_for(served):
    graphs, recorder = graphed(served)
    for _ in range(2):
        SelectivePrefill(served, graphs).run(requests(served, RULES))
    assert graphs.recorded

    def settle() -> None:
        raise RuntimeError("no device")

    recorder.settle = settle
    with pytest.raises(RuntimeError, match="no device"):
        graphs.forget()
    assert not graphs.recorded and graphs.recorder is None and isinstance(graphs.buffers, StaticRows)
