"""Divergence of next-token distributions against its formula, and the logits of targets that it compares."""

from dataclasses import asdict

import pytest
import torch

from cacheslide.core.engine import ReuseEngine
from cacheslide.core.prompt import Prompt
from cacheslide.errors import PromptError
from cacheslide.policies.registry import load_policy
from cacheslide.quality.divergence import divergence
from cacheslide.store import MemoryChunkStore
from tests.helpers.prompts import prompt
from tests.helpers.token_ids import random_ids

TARGETS = [3, 0, 96, 41, 7]


def pair(dtype=torch.float32, scale=3.0):
    g = torch.Generator().manual_seed(5)
    one, other = (scale * torch.randn(5, 97, generator=g) for _ in range(2))
    other[:2] = one[:2] + 0.01 * other[:2]  # two rows that are near
    return one.to(dtype), other.to(dtype)


def by_formula(exact, other):
    p, q = exact.double().softmax(-1), other.double().softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1)
    picked = [q[i, t].log() for i, t in enumerate(TARGETS)], [p[i, t].log() for i, t in enumerate(TARGETS)]
    nll, exact_nll = (-sum(x).item() / 5 for x in picked)
    agreement = sum(int(a.argmax() == b.argmax()) for a, b in zip(p, q, strict=True)) / 5
    return {"kl": kl.mean().item(), "kl_max": kl.max().item(), "agreement": agreement, "nll": nll,
            "nll_change": nll - exact_nll}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_figures_are_those_of_the_formula_whatever_the_dtype(dtype):
    exact, other = pair(dtype)
    out = asdict(divergence(exact, other, TARGETS))
    wanted = by_formula(exact, other)
    assert 0.2 < wanted["agreement"] < 1 and wanted["kl_max"] > wanted["kl"] > 0.1
    assert {k: out[k] for k in wanted} == pytest.approx(wanted, abs=2e-6)
    assert out["tokens"] == 5 and out["greedy_equal"] is False


def test_it_is_recomputes_distribution_that_weighs():
    exact, other = pair()
    assert divergence(exact, other, TARGETS).kl != pytest.approx(divergence(other, exact, TARGETS).kl, rel=0.01)


def test_a_run_beside_itself_is_at_zero():
    exact, _ = pair()
    best = exact.argmax(-1).tolist()
    out = divergence(exact, exact + 2.5, best)  # a constant changes no distribution
    assert 0 <= out.kl <= out.kl_max < 1e-6 and abs(out.nll_change) < 1e-6
    assert out.agreement == 1.0 and out.greedy_equal is True
    missed = [*best[:4], best[4] ^ 1]
    assert divergence(exact, exact, missed).greedy_equal is False and divergence(exact, exact, missed).agreement == 1.0


def test_near_logits_are_told_apart_as_decoding_does():
    """Normalised in float32 the two would be equal, and the first one the larger."""
    logits = torch.zeros(1, 97)
    logits[0, 7] = 1e-8
    assert logits.log_softmax(-1)[0, 7] == logits.log_softmax(-1)[0, 0]
    assert divergence(logits, logits, [7]).greedy_equal


def test_shapes_and_missing_targets_are_one_line():
    exact, other = pair()
    for a, b, ids in [
        (exact, other[:4], TARGETS),
        (exact[:, :9], other, TARGETS),
        (exact, other, [1]),
        (exact, other, ()),
    ]:
        with pytest.raises(PromptError, match=rf"{len(ids)} targets do not go with logits of \(5, ") as wrong:
            divergence(a, b, ids)
        assert "\n" not in str(wrong.value)


@pytest.mark.parametrize("side", [0, 1])
def test_logits_that_are_no_numbers_are_refused(side):
    logits = pair()
    logits[side][3, 40] = float("nan")
    with pytest.raises(PromptError, match="not finite"):
        divergence(*logits, TARGETS)


def served(model, name, **more):
    engine = ReuseEngine(model, load_policy(name), MemoryChunkStore())
    engine.build(prompt(7, 3))
    return engine, engine.prefill(prompt(13, 5), room=12, **more)


@pytest.mark.parametrize("count", [1, 2, 9])
def test_scored_logits_are_those_of_one_prefill_of_prompt_and_targets(model, count):
    engine, state = served(model, "recompute")
    targets, ids = random_ids(count, 77), prompt(13, 5).token_ids
    logits = engine.score(state, targets)
    whole = []
    for end in range(count):
        whole.append(engine.prefill(Prompt.from_spans(ids + targets[:end], [])).logits)
    torch.testing.assert_close(logits, torch.stack(whole), atol=2e-5, rtol=1e-4)


def test_scoring_leaves_the_state_as_it_was(model, monkeypatch):
    engine, state = served(model, "cacheslide_first_turn")
    held = state.kv.k[:, : state.length].clone(), state.kv.v[:, : state.length].clone(), state.logits.clone()
    before = state.length, state.next_position
    first = engine.score(state, random_ids(9, 77))
    assert (state.length, state.next_position) == before and torch.equal(state.logits, held[2])
    assert torch.equal(state.kv.k[:, : state.length], held[0]) and torch.equal(state.kv.v[:, : state.length], held[1])
    engine.score(state, random_ids(5, 78))
    assert torch.equal(engine.score(state, random_ids(9, 77)), first)
    monkeypatch.setattr(engine.executor, "run", None)  # one target is what the prefill has predicted already
    assert torch.equal(engine.score(state, (4,)), held[2][None])
    with pytest.raises(PromptError, match="no tokens to score"):
        engine.score(state, ())


def test_equal_most_likely_targets_mean_equal_greedy_decoding(model):
    """Teacher-forced equality and decoding by both say the same, where tokens differ and where they do not."""
    outcomes = set()
    for name in ("recompute", "cacheslide_first_turn", "cacheslide", "cacheblend", "epic"):
        for most in (1, 3, 12):
            exact, reference = served(model, "recompute")
            engine, state = served(model, name)
            greedy = exact.generate(reference, reference.logits, most, frozenset())
            _, again = served(model, "recompute")
            out = divergence(exact.score(again, greedy), engine.score(state, greedy), greedy)
            decoded = engine.generate(state, state.logits, most, frozenset())
            assert out.greedy_equal is (decoded == greedy)
            outcomes.add((name, out.greedy_equal))
    assert ("recompute", False) not in outcomes and {o for n, o in outcomes if n == "cacheslide"} == {True, False}
