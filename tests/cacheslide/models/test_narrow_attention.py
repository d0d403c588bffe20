"""Attention to updated text alone, as the paper's section 4.3 prints it: recomputed tokens see it and themselves."""

from dataclasses import replace

import pytest
import torch

from cacheslide.core.engine import ReuseEngine
from cacheslide.core.prompt import Prompt
from cacheslide.errors import PolicyError
from cacheslide.models.adapter import RowGroup, refuse_narrow
from cacheslide.models.attention import narrow_attention, row_attention
from cacheslide.policies.registry import load_policy
from cacheslide.policies.top_deviation import Promotion, Swap, TopDeviation
from cacheslide.store import MemoryChunkStore


def one_by_one(q, k, v, rows, opened, window):
    """The definition, a query at a time in float64."""
    out, group = [], q.shape[1] // k.shape[1]
    for i, row in enumerate(rows.tolist()):
        seen = [o for o in opened.tolist() if o <= row] + [row]
        seen = [o for o in seen if window is None or o > row - window]
        keys, values = (t[seen].double().repeat_interleave(group, dim=1) for t in (k, v))
        weights = torch.einsum("hd,khd->hk", q[i].double(), keys).mul(q.shape[-1] ** -0.5).softmax(-1)
        out.append(torch.einsum("hk,khd->hd", weights, values))
    return torch.stack(out)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("window", [None, 5])
def test_against_the_definition_with_every_other_key_poisoned(heads, kv_heads, window):
    g = torch.Generator().manual_seed(3)
    rows, opened = torch.tensor([2, 7, 8, 20]), torch.tensor([0, 5, 6, 19, 22])
    q = torch.randn(len(rows), heads, 10, generator=g)
    k, v = (torch.full((24, kv_heads, 10), float("nan")) for _ in range(2))
    used = torch.cat((rows, opened))
    for t in (k, v):
        t[used] = torch.randn(len(used), kv_heads, 10, generator=g)
    found = narrow_attention(q, k, v, rows, opened, None, window)
    torch.testing.assert_close(found.double(), one_by_one(q, k, v, rows, opened, window), atol=1e-5, rtol=1e-5)


def test_a_query_that_may_see_everything_is_row_attention():
    g = torch.Generator().manual_seed(4)
    rows = torch.tensor([9])
    q, k, v = torch.randn(1, 4, 8, generator=g), torch.randn(10, 2, 8, generator=g), torch.randn(10, 2, 8, generator=g)
    torch.testing.assert_close(narrow_attention(q, k, v, rows, torch.arange(9)), row_attention(q, k, v, rows))


PREVIOUS = Prompt.from_spans([*range(5, 12), *range(30, 62), 3], [(7, 39)])
PROMPT = Prompt.from_spans([*range(14, 25), *range(30, 62), 4], [(11, 43)])


def served(model, rule):
    engine = ReuseEngine(model, replace(load_policy("cacheslide_first_turn"), correction=rule), MemoryChunkStore())
    engine.build(PREVIOUS)
    return engine.prefill(PROMPT)


def test_it_changes_recomputed_tokens_alone_and_only_behind_the_selection_layer(model):
    wide, narrow = (served(model, TopDeviation(0.25, layer=1, attends=how)) for how in ("all", "updated"))
    assert torch.equal(wide.output.selected, narrow.output.selected) and len(narrow.output.selected) == 8
    chosen, fixed = narrow.output.selected, torch.arange(11, 43)
    resting = fixed[~torch.isin(fixed, chosen)]
    for layer in range(model.num_layers):
        same = torch.isclose(wide.kv.k[layer], narrow.kv.k[layer], atol=1e-5).all(-1).all(-1)
        assert same[resting].all()
        assert same[chosen].all() if layer < 2 else not same[chosen].all()  # layer 1's output is the first to differ
    assert wide.receipt.compute_fraction == narrow.receipt.compute_fraction


def test_updated_tokens_in_front_are_exact_either_way(model):
    exact = ReuseEngine(model, load_policy("recompute"), MemoryChunkStore()).prefill(PROMPT)
    found = served(model, TopDeviation(0.5, layer=2, attends="updated", fusion="paper", swap=Swap(every=1)))
    torch.testing.assert_close(found.kv.k[:, :11], exact.kv.k[:, :11])
    assert not found.kv.k[:, : len(PROMPT)].isnan().any()


def test_a_host_that_cannot_narrow_says_so():
    group = RowGroup(None, torch.arange(2), torch.tensor([True, False]), torch.arange(1))
    with pytest.raises(PolicyError, match="reference host only"):
        refuse_narrow([RowGroup(None, torch.arange(2)), group])


@pytest.mark.parametrize(
    "wrong", [{"attends": "fixed"}, {"attends": "updated", "promote": (Promotion(1, 0.1),)}], ids=["name", "promotion"]
)
def test_what_cannot_be_asked_for(wrong):
    with pytest.raises(PolicyError, match="attends"):
        TopDeviation(0.1, **wrong)
