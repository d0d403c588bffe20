"""The scheduler's half without an engine: claims, blocks, history, families, jobs, and the counters of its receipts."""

import struct
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import ClassVar

import prometheus_client
import pytest

pytest.importorskip("vllm")

from vllm.v1.request import RequestStatus

from cacheslide.core.prompt import Prompt
from cacheslide.vllm.connector import CacheSlideConnector
from cacheslide.vllm.guard import SERVER
from cacheslide.vllm.options import ServerOptions
from cacheslide.vllm.protocol import WorkerReport
from cacheslide.vllm.scheduler.metrics import ReuseStats
from cacheslide.vllm.scheduler.receipts import forecast
from cacheslide.vllm.scheduler.retention import job_of
from cacheslide.vllm.scheduler.side import SchedulerSide
from tests.helpers.scheduling import FIXED_END, GEOMETRY, TURN, finished, know, request, side, step_output

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("computed", "hits"), [(0, 7), (16, 6), (49, 4), (80, 2)])
def test_claims_start_behind_the_prefix_cache_and_end_with_the_last_chunk(computed, hits):
    scheduler, asked = side(), request()
    scheduler.arrive(asked)
    assert scheduler.claim(asked, computed) == 0  # nothing is stored yet
    know(scheduler)
    assert scheduler.claim(asked, computed) == FIXED_END - computed
    assert len(scheduler.tracked["r"].reuse) == hits
    scheduler.allocated(asked, FIXED_END - computed)
    [load] = scheduler.step(step_output({"r": 5}, {"r": FIXED_END})).loads
    assert (load.start, load.end, load.limit) == (computed, FIXED_END, len(TURN) - 1)
    assert not load.plan.schema and load.block_ids == [1, 2, 3]


def test_nothing_is_claimed_when_the_prefix_cache_covers_the_chunks():
    scheduler, asked = side(), request()
    scheduler.arrive(asked)
    know(scheduler)
    assert scheduler.claim(asked, 97) == 0  # only the question is left
    assert "beyond vLLM's prefix cache" in scheduler.finish(asked)["fallback"]


def test_a_step_takes_no_more_rows_than_allowed():
    scheduler = side(tokens_per_step=150)
    asked = [request(str(i)) for i in range(3)]
    for r in asked:
        scheduler.arrive(r)
    know(scheduler, "0")
    assert [scheduler.claim(r, 0) for r in asked] == [FIXED_END, None, None]
    scheduler.allocated(asked[0], FIXED_END)
    scheduler.step(step_output({"0": 5}, {"0": FIXED_END}))
    assert scheduler.claim(asked[1], 0) == FIXED_END


def test_the_last_row_is_vllms_own_where_the_prompt_ends_with_a_chunk():
    ends_fixed = Prompt(TURN.segments[:-1])
    scheduler, asked = side(), request(turn=ends_fixed)
    scheduler.arrive(asked)
    know(scheduler)
    assert scheduler.claim(asked, 0) == len(ends_fixed) - 1


def test_blocks_that_another_request_fills_in_this_step_are_waited_for():
    scheduler, asked, plain = side(), request(), request("plain")
    reused = TURN.chunks(16)[-1].end
    scheduler.arrive(asked)
    know(scheduler)
    plain.kv_transfer_params, plain.block_hashes = None, [b"0", b"1", b"2", b"3"]
    asked.block_hashes = [b"0", b"1", b"x", b"y"]
    scheduler.allocated(plain, 0)
    assert scheduler.claim(asked, 32) is None  # both blocks are shared and not computed yet
    plain.num_computed_tokens = 20
    assert scheduler.claim(asked, 32) is None and scheduler.claim(asked, 16) == reused - 16
    plain.num_computed_tokens = 40
    assert scheduler.claim(asked, 32) == reused - 32
    plain.num_computed_tokens, plain.status = 0, RequestStatus.PREEMPTED  # it computes nothing now
    assert scheduler.claim(asked, 32) == reused - 32
    plain.status = RequestStatus.RUNNING
    assert scheduler.finish(plain) is None and scheduler.claim(asked, 32) == reused - 32


def test_history_leaves_with_the_next_step_that_is_planned():
    """Async scheduling plans a step before the one it follows has ended: the copy rides with the one after."""
    scheduler, asked = side(), request(policy="naive_reuse", history=len(TURN) - 5)
    scheduler.arrive(asked)
    scheduler.claim(asked, 0)
    scheduler.allocated(asked, 0)
    scheduler.step(step_output({"r": len(TURN)}, {"r": 0}))
    assert not scheduler.step(step_output({"r": 1}, {"r": len(TURN)})).history_saves
    receipt = scheduler.finish(finished(asked, 30), [7, 8, 9])
    assert receipt["history"] == {
        "start": len(TURN) - 5,
        "end": len(TURN) + 29,
        "generation": 0,
        "from": "blocks",
    }
    assert all(key in scheduler.index for plan in scheduler.retention.history_saves for key, _ in plan.chunks)
    [save] = scheduler.step(step_output({}, {})).history_saves
    rows = [(chunk.start, chunk.end) for _, chunk in save.chunks]
    assert save.block_ids == [7, 8, 9] and rows[0][0] == len(TURN) - 5 and rows[-1][1] == len(TURN) + 29
    assert not scheduler.step(step_output({}, {})).history_saves


def test_a_prompt_that_spans_were_found_in_is_planned_with_them():
    scheduler = side(find_spans=True, span_tokens=8)
    first, again, beam = (request(str(i)) for i in range(3))
    for asked in (first, again, beam):
        asked.kv_transfer_params = None
    beam.sampling_params = SimpleNamespace(prompt_logprobs=None, max_tokens=1, detokenize=False)
    scheduler.arrive(beam)
    assert not scheduler.tracked and not scheduler.planner.memory.held
    scheduler.arrive(first)
    assert "seen before" in scheduler.finish(first)["fallback"]
    scheduler.arrive(again)
    assert sum(len(c) for c in scheduler.tracked["1"].plan.chunks) == len(TURN)


def member(scheduler, req_id: str, generated: int, name: str = "search", salt=None, **annotations):
    """A request of a family, `generated` tokens behind its prompt, as it arrives."""
    asked = request(req_id, **annotations, family={"name": name, "rows": len(TURN)})
    asked.prompt_token_ids += range(3, 3 + generated)
    asked.num_prompt_tokens, asked.cache_salt = len(asked.prompt_token_ids), salt
    scheduler.arrive(asked)
    return asked


def test_a_family_decides_once_and_later_members_follow():
    scheduler = side()
    first = member(scheduler, "first", 0)
    know(scheduler, "first")
    assert scheduler.claim(first, 16) == FIXED_END - 16
    scheduler.finish(first)
    follower = member(scheduler, "follower", 3)
    tracked = scheduler.tracked["follower"]
    assert tracked.follows and not tracked.exact and tracked.retained and tracked.rows == len(TURN)
    assert scheduler.claim(follower, len(TURN) // 16 * 16) == 0  # its rows are there
    assert scheduler.finish(follower)["chunks_hit"] == 0 and scheduler.stats.data["requests"] == 1
    lost = member(scheduler, "lost", 5)
    assert scheduler.claim(lost, 32) == FIXED_END - 32  # its rows were given away
    scheduler.index.clear()
    assert scheduler.claim(lost, 32) == 0 and "no chunk" in scheduler.finish(lost)["fallback"]
    assert scheduler.stats.data["requests"] == 2


def test_a_family_that_started_exactly_stays_exact_and_tenants_have_their_own():
    scheduler = side()
    first = member(scheduler, "first", 0)
    assert scheduler.claim(first, 0) == 0
    know(scheduler, "first")
    assert "no chunk" in scheduler.finish(first)["fallback"]
    assert member(scheduler, "later", 1).request_id not in scheduler.tracked
    for other in ({"salt": "tenant"}, {"name": "other"}):
        asked = member(scheduler, "other", 1, **other)
        assert not scheduler.tracked["other"].follows
        scheduler.finish(asked)
    for n in range(300):
        scheduler.finish(member(scheduler, "one", 0, name=str(n)))
    member(scheduler, "forgotten", 1)
    assert not scheduler.tracked["forgotten"].follows


def test_a_request_that_cannot_be_planned_is_computed_exactly():
    scheduler, asked = side(), request(layer=9)
    scheduler.arrive(asked)
    assert scheduler.claim(asked, 0) == 0
    assert "layer 9" in scheduler.finish(asked)["fallback"] and not scheduler.tracked
    unannotated = request()
    unannotated.kv_transfer_params = None
    scheduler.arrive(unannotated)
    assert scheduler.claim(unannotated, 0) == 0 and scheduler.finish(unannotated) is None


def test_own_prefills_are_saved_and_other_encodings_become_jobs():
    for name, saves, encodes in (("naive_reuse", 1, 0), ("cacheslide", 0, 1), ("epic", 0, 1), ("recompute", 0, 0)):
        scheduler, asked = side(encode="now"), request(policy=name)
        scheduler.arrive(asked)
        assert scheduler.claim(asked, 0) == 0
        scheduler.allocated(asked, 0)
        first = scheduler.step(step_output({"r": 60}, {"r": 0}))
        assert not first.saves and not first.encodes  # the prompt is not complete yet
        last = scheduler.step(step_output({"r": len(TURN) - 60}, {"r": 60}))
        assert (len(last.saves), len(last.encodes)) == (saves, encodes), name
        assert len(scheduler.index) == (0 if name == "recompute" else len(TURN.chunks(16)))


def test_jobs_wait_for_a_later_step_keep_the_budget_and_are_not_doubled():
    scheduler = side(encode_tokens_per_step=60)  # less than one chain: one job a step
    asked = [request(str(i), policy=name) for i, name in enumerate(("cacheslide", "cacheslide", "epic"))]
    for r in asked:
        scheduler.arrive(r)
        scheduler.claim(r, 0)
    rows = {r.request_id: len(TURN) for r in asked}
    assert not scheduler.step(step_output(rows, dict.fromkeys(rows, 0))).encodes
    assert len(scheduler.retention.jobs) == 2
    kinds = []
    while scheduler.retention.jobs:
        jobs = scheduler.step(step_output({}, {})).encodes
        assert len(jobs) <= 1
        kinds += [job.encoding.name for job in jobs]
    assert kinds == ["fixed_chain", "isolated"] and len(scheduler.index) == 2 * len(TURN.chunks(16))


def test_what_crosses_to_the_workers_names_every_token_once():
    ids = [70_000 + i for i in range(4000)]
    turn = Prompt.from_spans(ids, [(100, 1900), (2000, 3900)])
    geometry, place = replace(GEOMETRY, max_positions=8192), lambda i: b"J" + struct.pack("<i", ids[i])
    config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=16), kv_transfer_config=SimpleNamespace(engine_id="test")
    )
    scheduler, asked = SchedulerSide(config, ServerOptions(chunk_size=1024), geometry), request(turn=turn)
    scheduler.arrive(asked)
    know(scheduler)
    claimed = scheduler.claim(asked, 0)
    scheduler.allocated(asked, claimed)
    [load] = scheduler.step(step_output({"r": 100}, {"r": claimed})).loads
    job = job_of(scheduler.tracked["r"].policy, scheduler.tracked["r"].plan)
    for plan in (load, job):
        assert plan.plan.prompt.token_ids == tuple(ids)  # and by now this is held beside the segments
        sent = bytes(ForkingPickler.dumps(plan))
        assert [sent.count(place(i)) for i in (0, 150, 3000)] == [1, 1, 1]
        assert len(sent) < 5 * len(ids) + 2000, "five bytes a token, no positions, and each key once"


class Counter:
    """As much of a Prometheus counter as the metrics use."""

    made: ClassVar[dict] = {}

    def __init__(self, name, documentation, labelnames) -> None:
        self.name, self.labelnames = name, labelnames

    def labels(self, *values):
        assert len(values) == len(self.labelnames)
        return self.made.setdefault((self.name, *values), SimpleNamespace(total=0, inc=self._inc((self.name, *values))))

    def _inc(self, key):
        def inc(by):
            self.made[key].total += by

        return inc


def test_receipts_become_counters():
    Counter.made.clear()
    SERVER.take()  # of the process: an earlier test may have raised a fault in it
    scheduler = side()
    for i, (annotations, measured) in enumerate([({}, None), ({"layer": 9}, None), ({}, 40)]):
        asked = request(str(i), **annotations)
        scheduler.arrive(asked)
        scheduler.claim(asked, 0)
        if measured:
            receipt = forecast(scheduler.tracked[str(i)]) | {"tokens_reused": measured, "fallback": ""}
            scheduler.on_worker_report(WorkerReport({str(i): receipt}))
        scheduler.finish(asked)
    stats = scheduler.take_stats()
    assert scheduler.take_stats().is_empty() and not stats.is_empty()
    total = CacheSlideConnector.build_kv_connector_stats(None).aggregate(stats).aggregate(ReuseStats())
    metrics = CacheSlideConnector.build_prom_metrics(
        SimpleNamespace(kv_transfer_config=None),
        {prometheus_client.Counter: Counter, prometheus_client.Gauge: None, prometheus_client.Histogram: None},
        ["model"],
        {0: ["m"]},
    )
    metrics.observe(total.data)
    found = {key: counter.total for key, counter in Counter.made.items() if counter.total}
    assert found == {
        ("cacheslide:requests", "m"): 3,
        ("cacheslide:tokens", "m"): 3 * len(TURN),
        ("cacheslide:rows", "m"): 3 * len(TURN),  # their names in the version before
        ("cacheslide:tokens_reused", "m"): 40,
        ("cacheslide:rows_reused", "m"): 40,
        ("cacheslide:chunks", "m"): 2 * len(TURN.chunks(16)),
        ("cacheslide:fallbacks", "m", "not_stored"): 1,
        ("cacheslide:fallbacks", "m", "refused"): 1,
    }


def test_an_idle_engine_steps_while_workers_wait_for_a_step_without_a_forward():
    connector = CacheSlideConnector.__new__(CacheSlideConnector)
    connector.scheduler = scheduler = side()
    connector.faults = scheduler.faults
    assert not connector.has_pending_push_work()
    report = WorkerReport().aggregate(WorkerReport(wants_idle=True))
    assert report
    scheduler.on_worker_report(report)
    scheduler.step(step_output({"r": 5}, {}))  # a step with a forward serves nobody who waits for another kind
    assert connector.has_pending_push_work()
    assert scheduler.step(step_output({}, {})).idle and not connector.has_pending_push_work()
