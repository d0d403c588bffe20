"""Replayed layers on the CPU, where "recording" a layer is doing it again: sizes, padding, and what is not replayed."""

from collections import defaultdict
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("vllm")

from cacheslide.core.placement import Piece
from cacheslide.core.selective_prefill import SelectivePrefill
from cacheslide.core.static_prefill import StaticPrefill
from cacheslide.models.adapter import RowGroup
from cacheslide.policies.edges import EdgeTokens
from cacheslide.policies.first_tokens import FirstTokens
from cacheslide.policies.none import NoCorrection
from cacheslide.vllm.worker.attention import gathered
from cacheslide.vllm.worker.graph_rows import MOST_ROWS, NOBODY, Size, StaticRows, size_for
from cacheslide.vllm.worker.graphs import MOST_SIZES, RECORD_AT
from cacheslide.vllm.worker.kv_layout import addresses, scratch_kv
from cacheslide.vllm.worker.paged_source import Caches, PagedChunks
from cacheslide.vllm.worker.prefetch import LayerFetch
from tests.helpers.graphed import BATCHES, BLOCK, Served, everything, graphed, poisoned
from tests.helpers.paged import kv_of, rings_for
from tests.helpers.requests import requests

pytestmark = pytest.mark.slow


@pytest.fixture
def served(checkpoint) -> Served:
    return Served.from_pretrained(checkpoint)


@pytest.mark.parametrize("rules", BATCHES.values(), ids=BATCHES)
def test_replayed_layers_equal_launched_ones(served, rules, monkeypatch):
    want_made = requests(served, rules)
    want = everything(SelectivePrefill(served).run(want_made), want_made)
    graphs, recorder = graphed(served)
    executor = SelectivePrefill(served, graphs)
    with poisoned(monkeypatch):
        for turn in range(3):
            served.fresh()  # other blocks hold the prompt's KV each time, in another cache
            made = requests(served, rules)
            got = everything(executor.run(made), made)
            assert got[1] == want[1]
            for mine, theirs in zip(got[0], want[0], strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
            if turn == 1:  # recorded over this cache: from here on it stays
                assert graphs.replayed == 1 and recorder.recorded == 5 and graphs.eager == {"first of its size": 1}
                monkeypatch.setattr(served, "fresh", lambda: None)
    assert graphs.replayed == 2 and recorder.recorded == 5


def test_one_recording_serves_every_batch_of_its_size(served, monkeypatch):
    """Requests of other lengths, in other blocks, beside others: what the run before left must not show."""
    graphs, recorder = graphed(served, met=defaultdict(lambda: RECORD_AT))
    executor = SelectivePrefill(served, graphs)
    batches = [([FirstTokens(0.3), EdgeTokens(2, 2)], s) for s in ((5, 8), (6, 9), (7, 2))]
    batches += [([NoCorrection(), FirstTokens(0.1), None], (4, 8, 1)), ([FirstTokens(0.25)] * 2, (3, 3))]
    with poisoned(monkeypatch):
        for rules, seeds in batches:
            made, again = requests(served, rules, seeds), requests(served, rules, seeds)
            got, want = everything(executor.run(made), made), everything(SelectivePrefill(served).run(again), again)
            for mine, theirs in zip(got[0], want[0], strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    assert graphs.replayed == 5 and recorder.recorded == 5 * len(graphs.recorded) < 25


@pytest.mark.parametrize("fetched", [False, True], ids=["on_device", "from_host"])
def test_cached_rows_arrive_between_replayed_layers(served, fetched):
    """All layers at once from the device, group by group from the host."""
    [plain] = requests(served, [FirstTokens(0.2)])
    [want] = SelectivePrefill(served).run([plain])
    graphs, _ = graphed(served, met=defaultdict(lambda: RECORD_AT))
    [request] = requests(served, [FirstTokens(0.2)])
    pieces = [Piece(p.chunk, p.length) for p in request.source.pieces]
    fetch = LayerFetch(pieces, 0, 5, rings_for(pieces, 5, group=2), group=2) if fetched else None
    target = request.positions[request.reused]
    placement = type("Placement", (), {"rotation": "delta"})()
    settings = (pieces, target, placement, served.rotaries, torch.float32, 0, torch.device("cpu"))
    request.source = PagedChunks(*settings, Caches(served.paged), fetch)
    [got] = SelectivePrefill(served, graphs).run([request])
    assert graphs.replayed == 1, graphs.eager
    rows = len(request.token_ids)
    for mine, theirs in zip(kv_of(request.kv, 5, rows), kv_of(plain.kv, 5, rows), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.final, want.final, atol=1e-5, rtol=1e-5)


def test_a_run_over_padding_alone_leaves_the_cache_as_it_is(served):
    """Recording a size runs every layer over nothing."""
    for layer in served.paged:
        layer.cache.fill_(3.0)
    graphs, _ = graphed(served)
    assert graphs._record(Size(64, 8, 16)) is graphs.recorded[Size(64, 8, 16)]
    for layer in range(5):
        graphs.recorded[Size(64, 8, 16)].replay(layer)
    assert all((layer.cache[:-1] == 3.0).all() for layer in served.paged)
    assert graphs.buffers.hidden.isfinite().all()


def other_cache(served, made):
    made[0].kv = scratch_kv(5, 200, 2, 10, torch.float32, "cpu", BLOCK)


UNFIT = {
    "switched off": lambda served, graphs, made: setattr(graphs, "enabled", False),
    "tensor parallelism": lambda served, graphs, made: setattr(served, "ranks", 2),
    "attention": lambda served, graphs, made: setattr(served, "attend_paged", gathered),
    "schema positions": lambda served, graphs, made: setattr(served, "schema_positions", True),
    "scratch": lambda served, graphs, made: other_cache(served, made),
    "size": lambda served, graphs, made: setattr(graphs, "most_blocks", 1),
    "too many sizes": lambda served, graphs, made: graphs.recorded.update(
        {Size(i, 0, 0): None for i in range(MOST_SIZES)}
    ),
}


@pytest.mark.parametrize("reason", UNFIT)
def test_what_cannot_be_replayed_is_launched_and_counted(served, reason):
    graphs, recorder = graphed(served, _at=addresses(served.paged))
    made, again = requests(served, [FirstTokens(0.2)]), requests(served, [FirstTokens(0.2)])
    want = everything(SelectivePrefill(served).run(again), again)
    UNFIT[reason](served, graphs, made)
    for _ in range(3):
        got = everything(SelectivePrefill(served, graphs).run(made), made)
    assert graphs.eager == {reason: 3} and graphs.replayed == recorder.recorded == 0
    for mine, theirs in zip(got[0], want[0], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_a_recording_that_fails_costs_no_run(served):
    graphs, recorder = graphed(served)
    recorder.fails = True
    made = requests(served, [FirstTokens(0.2)])
    for _ in range(3):
        SelectivePrefill(served, graphs).run(made)
    assert graphs.eager == {"first of its size": 1, "not recorded": 2} and not graphs.recorded
    assert isinstance(graphs, StaticPrefill) and len(graphs.failed) == 1


def test_recordings_go_when_their_caches_or_weights_do(served):
    graphs, recorder = graphed(served)
    executor = SelectivePrefill(served, graphs)
    made = requests(served, [FirstTokens(0.2)])
    for _ in range(2):
        executor.run(made)
    assert graphs.replayed == 1 and recorder.settled == 0 and graphs.nbytes == 5000
    graphs.forget()
    assert not graphs.recorded and recorder.settled == 1 and graphs.nbytes == 0
    for _ in range(2):
        executor.run(made)
    assert graphs.replayed == 2 and recorder.recorded == 10
    for layer in served.paged:
        layer.cache = layer.cache.clone() if layer is served.paged[3] else layer.cache  # one lies elsewhere
    made = requests(served, [FirstTokens(0.2)])
    for _ in range(2):
        executor.run(made)
    assert graphs.replayed == 3 and recorder.settled == 2 and recorder.recorded == 15


def test_sizes_hold_what_they_are_for():
    most = 2048
    for rows in (1, 63, 64, 65, 100, 1190, 2049, 4095, MOST_ROWS):
        for requested in (1, 2, 8, 9, 64):
            for blocks in (1, 16, 17, 513, 1500, most):
                size = size_for(rows, requested, blocks, most)
                assert size.rows >= rows and size.requests >= requested and most >= size.blocks >= blocks
                assert size.rows <= max(64, 1.25 * rows) and size.blocks <= max(16, 1.5 * blocks)
    assert size_for(1190, 1, 513, most) == Size(1280, 1, 768) and size_for(440, 1, 1, most).rows == 512
    assert len({size_for(n, 1, 1, most).rows for n in range(1, MOST_ROWS + 1)}) == 34
    for rows, requested, blocks in ((0, 1, 1), (MOST_ROWS + 1, 1, 1), (1, 65, 1), (1, 1, most + 1)):
        assert size_for(rows, requested, blocks, most) is None


def test_rows_of_one_size_share_the_memory_of_all(served):
    whole = StaticRows.make(served, 50)
    part = whole.at(Size(64, 8, 20))
    kv = served.new_kv(40)
    group = RowGroup(kv, torch.tensor([3, 17, 39]))
    part.fill(torch.ones(3, 40), torch.tensor([5, 6, 7]), [group])
    assert whole.cu_rows[:9].tolist() == [0] + 8 * [3] and whole.rows[:4].tolist() == [3, 17, 39, NOBODY]
    assert whole.slots[:4].tolist() == [*kv.slots[[3, 17, 39]].tolist(), -1]
    assert whole.table[0, :5].tolist() == kv.table.tolist() and whole.positions[:4].tolist() == [5, 6, 7, 0]
    assert whole.hidden[:3].eq(1).all() and whole.hidden[3:].eq(0).all()


def test_a_size_that_was_met_is_recorded_when_the_engine_is_idle(served):
    served.running = nullcontext
    graphs, recorder = graphed(served)
    executor = SelectivePrefill(served, graphs)
    assert not graphs.record_waiting(idle=True)
    for rules in ([FirstTokens(0.3)], [FirstTokens(0.3), NoCorrection()]):
        executor.run(requests(served, rules))
    first, second = graphs.waiting
    assert graphs.record_waiting(idle=False) and not recorder.recorded
    assert graphs.record_waiting(idle=True) and list(graphs.recorded) == [first]
    assert not graphs.record_waiting(idle=True) and list(graphs.recorded) == [first, second]
    assert not graphs.replayed
    executor.run(requests(served, [FirstTokens(0.3)]))
    assert graphs.replayed == 1 and recorder.recorded == 10


def test_an_idle_engine_records_nothing_beside_graphs_of_caches_that_have_moved(served):
    served.running = nullcontext
    graphs, recorder = graphed(served)
    executor = SelectivePrefill(served, graphs)
    for rules in ([FirstTokens(0.3)], [FirstTokens(0.3)], [FirstTokens(0.3), NoCorrection()]):
        executor.run(requests(served, rules))
    assert len(graphs.recorded) == len(graphs.waiting) == 1
    served.fresh()  # the caches lie elsewhere
    assert not graphs.record_waiting(idle=True)
    assert not graphs.recorded and recorder.settled == 1


def test_a_size_that_cannot_be_recorded_waits_no_more(served):
    served.running = nullcontext
    graphs, recorder = graphed(served)
    SelectivePrefill(served, graphs).run(requests(served, [FirstTokens(0.3)]))
    recorder.fails = True
    assert not graphs.record_waiting(idle=True) and not graphs.recorded and len(graphs.failed) == 1
