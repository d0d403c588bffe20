"""A rank that fails inside a run meets the others at every sum that they still have, under each rule."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from baselines.gradual_filtering import GradualFiltering
from cacheslide.core.engine import ReuseEngine
from cacheslide.core.receipt import Receipt
from cacheslide.core.request_builder import find_pieces
from cacheslide.core.selective_prefill import SelectivePrefill
from cacheslide.policies.first_tokens import FirstTokens
from cacheslide.policies.question_aware import QuestionAware
from cacheslide.policies.shrinking import ShrinkingTokens
from cacheslide.policies.top_deviation import TopDeviation
from cacheslide.store import MemoryChunkStore
from cacheslide.vllm.worker.ranks import Team, TeamPrefill
from tests.helpers.prompts import chain, prompt

pytestmark = pytest.mark.slow

START = 10  # rows that are complete before the request


class Group:
    """One rank's view of the sums: how large each is."""

    def __init__(self) -> None:
        self.sums = []

    def all_reduce(self, x):
        self.sums.append(tuple(x.shape))
        return x


class Summing:
    """The reference model, with the sums over ranks that vLLM's layers have: embedding, attention, MLP, scores."""

    def __init__(self, model, group: Group) -> None:
        self.plain, self.group, self.ranks = model, group, 2
        self.layers = [SimpleNamespace(self_attn=model.config)]

    def __getattr__(self, name):
        return getattr(self.plain, name)

    def embed(self, token_ids):
        return self.group.all_reduce(self.plain.embed(token_ids))

    def finish(self, layer, hidden, attended):
        for _ in range(2):
            self.group.all_reduce(hidden)
        return self.plain.finish(layer, hidden, attended)

    def reduce_scores(self, scores):
        return self.group.all_reduce(scores)


def request_of(model, rule):
    """A request whose question stands behind its chunks, over rows that were there before."""
    engine, text = ReuseEngine(model, chain(rule), MemoryChunkStore(), chunk_size=16), prompt(13, 5)
    engine.build(prompt(7, 3))
    plan, kv = engine.plan(text), model.new_kv(len(text))
    SelectivePrefill(model).run([engine.builder.build(text.token_ids[:START], plan.positions[:START], kv)])
    fetch, receipt = lambda number, key, chunk: engine.store.get(key), Receipt("r", len(text))
    found = find_pieces(plan.keyed, START, len(text) - 1, fetch, receipt)
    given = text.token_ids[START:], plan.positions[START:], kv
    return engine.builder.build(*given, found=found, placement=engine.policy.placement, correction=rule, start=START)


RULES = [
    FirstTokens(0.3),
    TopDeviation(0.3, 1),
    QuestionAware(0.3, 2),
    ShrinkingTokens(0.5, 0.3, 2),
    GradualFiltering(0.3, spread=0.8),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_the_sums_of_a_hollow_run_are_those_of_the_run(model, rule):
    group, others = Group(), Group()
    request = request_of(model, rule)
    with torch.inference_mode():
        TeamPrefill(Summing(model, group), Team(), 8192).compute([request])
        failed = TeamPrefill(Summing(model, others), Team(), 8192)
        failed.team.group = others
        failed._keep_appointments([request], [])
    assert others.sums == group.sums and len(group.sums) > 2 * model.num_layers
