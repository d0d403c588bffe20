"""Layers in which nothing changes any more, run as one packed tensor, against the layer loop: equal bit for bit."""

import pytest
import torch

from cacheslide.core.active_tokens import ActiveTokens
from cacheslide.core.selective_prefill import SelectivePrefill
from cacheslide.core.static_prefill import StaticPrefill
from cacheslide.policies.edges import EdgeTokens
from cacheslide.policies.first_tokens import FirstTokens
from cacheslide.policies.none import NoCorrection
from cacheslide.policies.top_deviation import Promotion, Swap, TopDeviation
from tests.helpers.requests import requests


class Counted(StaticPrefill):
    """Notes from which layer on it ran."""

    def __init__(self, model) -> None:
        super().__init__(model)
        self.ran = []

    def run(self, states, hidden, first):
        self.ran.append(first)
        return super().run(states, hidden, first)


def kv_of(request):
    kv, rows = request.kv, torch.arange(len(request.token_ids))
    return [torch.stack([kv.read(layer, rows)[i] for layer in range(5)]) for i in range(2)]


BATCHES = {
    "nothing_cached": ([None], 0),
    "none": ([NoCorrection()], 0),
    "edges": ([EdgeTokens(3, 2)], 0),
    "first_tokens": ([FirstTokens(0.3)], 0),
    "everything": ([FirstTokens(1.0)], 0),
    "ragged": ([FirstTokens(0.3), None, EdgeTokens(2, 2)], 0),
    "selected": ([TopDeviation(0.3, 1)], 2),
    "selected_and_known": ([TopDeviation(0.3, 2), FirstTokens(0.2), None], 3),
    "selected_last": ([TopDeviation(0.3, 4)], None),
    "promoted": ([TopDeviation(0.1, 1, promote=(Promotion(1, 0.2), Promotion(2, 0.1)))], 3),
}


@pytest.mark.parametrize(("rules", "first"), BATCHES.values(), ids=BATCHES)
def test_static_layers_equal_the_layer_loop(model, rules, first, monkeypatch):
    static = Counted(model)
    requested = requests(model, rules)
    got = SelectivePrefill(model, static).run(requested)
    assert static.ran == ([] if first is None else [first])
    monkeypatch.setattr(ActiveTokens, "static_from", property(lambda self: self.model.num_layers))
    again, static = requests(model, rules), Counted(model)
    want = SelectivePrefill(model, static).run(again)
    assert static.ran == []
    for mine, theirs, request, other in zip(got, want, requested, again, strict=True):
        assert mine.tokens_computed == theirs.tokens_computed and len(mine.tokens_computed) == 5
        for name in ("selected", "active", "final"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
        for x, y in zip(kv_of(request), kv_of(other), strict=True):
            assert torch.equal(x, y) and not x.isnan().any()


def test_rules_that_may_still_act_stay_in_the_layer_loop(model):
    static = Counted(model)
    for rule in (TopDeviation(0.3, 0, fusion="paper"), TopDeviation(0.3, 0, swap=Swap(tau=2.0, every=2))):
        [request] = requests(model, [rule])
        SelectivePrefill(model, static).run([request])
    assert static.ran == []


def test_layer_inputs_are_captured_in_the_layer_loop(model):
    static = Counted(model)
    [output] = SelectivePrefill(model, static).run(requests(model, [None]), frozenset({2}))
    assert static.ran == [] and set(output.layer_inputs) == {2}


def test_a_run_in_which_no_row_is_active_places_everything(model):
    """Every row of the request has cached KV and none of it is recomputed: there is nothing to launch."""
    [request] = requests(model, [NoCorrection()])
    first = int(request.reused[0])
    count = int((request.reused.diff() != 1).nonzero()[0]) + 1  # the run at the start
    assert first == 0
    request.token_ids, request.positions = request.token_ids[:count], request.positions[:count]
    request.reused = request.reused[:count]
    request.source.pieces, request.runs = request.source.pieces[:1], type(request.runs).of(count)
    if request.source.deltas is not None:
        request.source.deltas = request.source.deltas[:count]
    [output] = SelectivePrefill(model).run([request])
    assert output.tokens_computed == [0] * 5 and output.hidden is None
    k, v = kv_of(request)
    for layer in range(5):
        assert all(map(torch.equal, (k[layer], v[layer]), request.source.layer(layer)))
