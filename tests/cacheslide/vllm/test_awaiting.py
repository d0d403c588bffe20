"""Chunks whose scores are to come: written to the storage tier once, with what they got; who is scored, and when."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm")

import itertools

from cacheslide.core.keys import CacheIdentity
from cacheslide.core.plan import make_plan
from cacheslide.vllm.options import ServerOptions
from cacheslide.vllm.protocol import ScoreJob, StepPlan
from cacheslide.vllm.scheduler.retention import BEHIND, PATIENCE, ChunkRetention, job_of
from cacheslide.vllm.worker.chunk_store import WorkerStore
from tests.helpers.chunks import chunk
from tests.helpers.late_copies import LateCopies
from tests.helpers.prompts import prompt
from tests.helpers.remembering import policy_of
from tests.helpers.scheduling import FIXED_END, GEOMETRY, TURN, finished, request, side, step_output

pytestmark = pytest.mark.slow


class Written(list):
    """In the place of a `StorageTier`: what was written through, in order."""

    def write(self, key, chunk, done) -> None:
        if done is not None:
            done.synchronize()
        self.append((key, chunk.scores))

    def release(self, keys) -> None:
        """Nothing was spilled."""


def store_of() -> tuple[WorkerStore, Written]:
    written = Written()
    return WorkerStore(torch.device("cpu"), LateCopies(), written), written


def test_a_chunk_is_written_when_it_has_its_scores():
    store, written = store_of()
    store.awaiting.update("ab")
    for i, key in enumerate("abc"):
        store.put(key, chunk(i))
    assert [key for key, _ in written] == ["c"]
    scores = torch.rand(40)
    assert store.rescore("a", scores) and store.nbytes == sum(chunk(i).nbytes for i in range(3)) + 160
    store.await_no_more("ab")
    assert sorted(key for key, _ in written) == ["a", "b", "c"] and not store.awaiting
    assert torch.equal(dict(written)["a"], scores) and dict(written)["b"] is None
    assert torch.equal(store.get("a").k, chunk(0).k) and torch.equal(store.get("a").scores, scores)
    store.await_no_more("abc")
    assert len(written) == 3


def test_what_leaves_memory_before_is_written_and_what_is_forgotten_is_not():
    store, written = store_of()
    store.awaiting.update("abcd")
    for i, key in enumerate("abc"):
        store.put(key, chunk(i))
    store.drop(["a", "d"])
    assert [key for key, _ in written] == ["a"] and store.awaiting == {"b", "c"}
    to, there = store_of()
    store.hand_over(to)
    assert not there and to.awaiting == {"b", "c"} and not store.awaiting
    to.clear()
    assert not there and not to.awaiting and not len(to)


def retention_of(**options) -> ChunkRetention:
    return ChunkRetention(ServerOptions(store_gib=1.0, **options), GEOMETRY)


def plan_of(policy, updated: int = 9):
    return make_plan(policy, CacheIdentity("m", "float32"), prompt(updated, 3), 16, 512)


def handed(retention: ChunkRetention, idle: bool = False, loads: tuple = ()) -> StepPlan:
    step = StepPlan(loads=list(loads))
    for entry in (*retention.jobs, *retention.score_jobs):
        entry.steps = max(entry.steps, BEHIND - 1)  # asked for in an earlier step
    retention.hand_out(step, idle)
    return step


def reserve(retention: ChunkRetention, plan, generation: int = 0) -> None:
    assert retention.reserve(dict(plan.keyed), 0, generation, scored=True) == ()


def test_a_plan_is_scored_once_and_only_what_is_exact_and_there():
    retention, policy = retention_of(), policy_of()
    plan = plan_of(policy)
    reserve(retention, replace(plan, keys=plan.keys[:3], chunks=plan.chunks[:3]))
    reserve(retention, replace(plan, keys=plan.keys[3:5], chunks=plan.chunks[3:5]), generation=1)
    for _ in range(2):
        retention.score(policy, plan, "now")
    assert len(retention.score_jobs) == 1 and retention.pending
    [job] = handed(retention).scores
    assert job.plan.keys == plan.keys[:3] and job.tokens == sum(len(c) for c in plan.chunks[:3])
    assert retention.index.scored == set(plan.keys[:3]) and not retention.pending
    retention.score(policy, plan, "now")
    assert handed(retention).scores == [] and not retention.pending
    retention.index.discard(plan.keys[0])  # a worker has lost it: it will be stored anew, and scored anew
    reserve(retention, replace(plan, keys=plan.keys[:1], chunks=plan.chunks[:1]))
    retention.score(policy, plan, "now")
    assert [job.plan.keys for job in handed(retention).scores] == [plan.keys[:1]]


@pytest.mark.parametrize("encoding", ["in_prompt", "fixed_chain"])
def test_jobs_come_when_the_first_token_of_their_prompt_is_out(encoding):
    """With asynchronous scheduling a step is planned before the output of the one before it is looked at."""
    retention, policy = retention_of(), policy_of(encoding)
    plan = plan_of(policy)
    if encoding == "in_prompt":
        reserve(retention, plan)
    else:
        retention.enqueue(job_of(policy, plan), "later")
    retention.score(policy, plan, "later")
    for _ in range(BEHIND):
        retention.hand_out(step := StepPlan(), idle=True)
        assert not step.encodes and not step.scores and retention.pending
    retention.hand_out(step := StepPlan(), idle=True)
    assert step.scores and bool(step.encodes) == (encoding == "fixed_chain") and not retention.pending


def test_jobs_give_way_to_loads_but_not_for_ever():
    retention, policy = retention_of(), policy_of("fixed_chain")
    for updated in (5, 9):
        retention.enqueue(job_of(policy, plan_of(policy, updated)), "later")
        retention.score(policy, plan_of(policy, updated), "later")
    steps = [handed(retention, loads=("a load",)) for _ in range(2 * PATIENCE + 4)]
    given = [i for i, step in enumerate(steps) if step.encodes or step.scores]
    assert given[0] == PATIENCE and not retention.jobs
    assert all(b - a > PATIENCE for a, b in itertools.pairwise(given))
    quiet = handed(retention)
    assert quiet.scores or not retention.score_jobs


def test_what_waits_to_be_encoded_is_scored_afterwards():
    retention, policy = retention_of(), policy_of("fixed_chain")
    plan = plan_of(policy)
    retention.enqueue(job_of(policy, plan), "later")
    retention.score(policy, plan, "now")
    busy = handed(retention, loads=("a load",))
    assert not busy.encodes and not busy.scores and retention.pending
    step = handed(retention, idle=True)
    assert [job.plan.keys for job in step.encodes] == [plan.keys] and step.encodes[0].scored
    assert [job.plan.keys for job in step.scores] == [plan.keys] and not retention.pending
    assert step.scores[0].tokens == plan.chunks[-1].end  # the prompt is the other context here


def test_a_job_that_may_wait_keeps_to_the_budget_and_ends_when_the_engine_is_idle():
    retention, policy = retention_of(encode_tokens_per_step=100), policy_of()
    plans = [plan_of(policy, n) for n in (5, 9)]
    other = replace(plans[1], keys=tuple(f"{k[:-1]}x" for k in plans[1].keys))
    for plan in (plans[0], other):
        reserve(retention, plan)
        retention.score(policy, plan, "later")
    assert handed(retention, loads=("a load",)).scores == []
    counts = [len(handed(retention, idle=True).scores) for _ in range(3)]
    assert counts == [1, 1, 0] and not retention.pending
    retention.score(policy, plans[0], "later")
    retention.clear()
    assert not retention.pending and not retention.index.scored


@pytest.mark.parametrize("encode", ["later", "off"])
def test_a_request_that_forbids_prefills_has_none_for_scores(encode):
    """Its history is copied all the same, and is written through at once: no scores are to come."""
    asked = request(policy="cacheslide_remember", history=FIXED_END, encode=encode)
    scheduler = side(encode="now")
    scheduler.arrive(asked)
    scheduler.claim(asked, 0)
    scheduler.allocated(asked, 0)
    scheduler.step(step_output({"r": len(TURN)}, {"r": 0}))
    assert scheduler.finish(finished(asked, 30), [7, 8, 9])["history"]["from"] == "blocks"
    [save] = scheduler.retention.history_saves
    assert save.scored == bool(scheduler.retention.score_jobs) == (encode == "later")


def test_the_chain_of_a_job_ends_with_its_last_chunk():
    plan = plan_of(policy_of())
    job = ScoreJob(policy_of().encoding, plan)
    assert job.of({plan.keys[0]}).tokens == 6 and job.of({plan.keys[2]}).tokens == 6 + 23
    assert job.tokens == 6 + 23 + 31 + 17
