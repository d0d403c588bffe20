"""A worker's score jobs over chunks that other prompts than the job's have left."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.core.selective_prefill import SelectivePrefill
from cacheslide.vllm.protocol import ScoreJob
from cacheslide.vllm.worker.chunk_store import WorkerStore
from cacheslide.vllm.worker.ranks import Team
from cacheslide.vllm.worker.scoring import Scorer
from tests.helpers.remembering import engine_of
from tests.helpers.token_ids import random_ids

pytestmark = pytest.mark.slow


class Worker(SimpleNamespace):
    """A worker's parts that score jobs use, over the reference model."""

    def survive(self, entry, does, *args) -> bool:
        try:
            does(*args)
        except RuntimeError as error:
            self.faults.append(error)
            return False
        return True

    def holds(self, key) -> bool:
        return self.store.contains(key)

    def new_executor(self) -> SelectivePrefill:
        return SelectivePrefill(self.model)


@torch.inference_mode()
@pytest.mark.parametrize("order", [("updated first", "fixed first"), ("fixed first", "updated first")])
def test_a_job_scores_what_is_held_whatever_prompt_it_is_of(model, monkeypatch, order):
    monkeypatch.setattr(model, "running", nullcontext, raising=False)
    system, text = Segment(random_ids(6, 6), Role.REUSE), Segment(random_ids(20, 20), Role.REUSE)
    updated, question = Segment(random_ids(9, 9), Role.RECOMPUTE), Segment(random_ids(3, 3), Role.RECOMPUTE)
    prompts = {"updated first": Prompt((updated, system, text, question))}
    prompts["fixed first"] = Prompt((system, updated, text, question))
    held, asked = (prompts[name] for name in order)
    engine, store = engine_of(model), WorkerStore(model.device)
    engine.build(held)
    keys = engine.plan(held).keys
    for key in keys:
        chunk = engine.store.get(key)
        store.put(key, type(chunk)(chunk.k, chunk.v, chunk.positions))
    worker = Worker(model=model, team=Team(), store=store, scored=0, faults=[])
    plan = engine.plan(asked)
    Scorer(worker).run(ScoreJob(engine.policy.encoding, plan))
    assert worker.scored == 1 and not worker.faults and plan.keys == keys and len(keys) == 3
    for key in keys:
        want = engine.store.get(key).scores
        torch.testing.assert_close(store.get(key).scores, want, atol=1e-5, rtol=1e-4)
    assert bool(store.get(keys[0]).scores.any()) == (order[0] == "updated first")


@pytest.mark.parametrize("number", range(3))
def test_a_rank_that_cannot_read_a_chunk_meets_the_others_no_more_and_no_less_often(model, monkeypatch, number):
    """Chunks whose contexts are one have no sum: whoever fails there has nobody to tell."""
    monkeypatch.setattr(model, "running", nullcontext, raising=False)
    system, text = Segment(random_ids(6, 6), Role.REUSE), Segment(random_ids(20, 20), Role.REUSE)
    updated = Segment(random_ids(9, 9), Role.RECOMPUTE)
    engine, meetings = engine_of(model), []
    engine.build(prompt := Prompt((system, updated, text, updated)))
    plan = engine.plan(prompt)
    for fails in (False, True):
        store, team, met = WorkerStore(model.device), Team(), []
        team.agree = lambda flags, met=met: met.append(len(flags)) or list(flags)
        for key in plan.keys:
            store.put(key, engine.store.get(key))
        worker = Worker(model=model, team=team, store=store, scored=0, faults=[])
        read = store.get

        def get(key, read=read):
            if key == plan.keys[number]:
                raise RuntimeError("no such memory")
            return read(key)

        store.get = get if fails else read
        Scorer(worker).run(ScoreJob(engine.policy.encoding, plan))
        meetings.append(met)
        assert len(worker.faults) == (fails and number > 0)  # the first is not read
    assert meetings[0] == meetings[1] == [7, 1, 1]
