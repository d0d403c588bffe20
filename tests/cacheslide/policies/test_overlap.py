"""The rule that recomputes what the updated text speaks of."""

import random
from dataclasses import replace

import pytest
import torch

from cacheslide.core.engine import ReuseEngine
from cacheslide.core.reused import ReusedTokens
from cacheslide.errors import PolicyError
from cacheslide.policies.deviation import tokens_of_ratio, top_mask, top_rows
from cacheslide.policies.overlap import OverlapTokens, decayed_sums, overlap
from cacheslide.policies.registry import load_policy
from cacheslide.store import MemoryChunkStore
from tests.helpers.prompts import prompt


def plain(reused: ReusedTokens, decay: float) -> list[float]:
    """The docstring's words, token by token."""
    rows = [s + i for s, n in zip(reused.starts, reused.lengths, strict=True) for i in range(n)]
    own = [reused.token_ids[r] for r in rows]
    updated = {t for r, t in enumerate(reused.token_ids) if r not in set(rows)}
    weights = [1 / own.count(t) if t in updated else 0.0 for t in own]
    return [sum(w * decay ** (i - j) for j, w in enumerate(weights[: i + 1])) for i in range(len(own))]


@pytest.mark.parametrize("seed", range(6))
def test_overlap_is_what_its_words_say(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 9) for _ in range(rng.randint(1, 4))]
    starts, at = [], 0
    for n in lengths:
        starts.append(at + rng.randint(0, 3))
        at = starts[-1] + n
    ids = [rng.randint(0, 12) for _ in range(at + rng.randint(1, 5))]
    reused = ReusedTokens(tuple(starts), tuple(lengths), None, ids)
    for decay in (0.0, 0.7):
        got = overlap(reused, decay)
        torch.testing.assert_close(got, torch.tensor(plain(reused, decay), dtype=torch.float64))


def one_by_one(weights, decay):
    out, carried = [], 0.0
    for weight in weights.tolist():
        carried = carried * decay + weight
        out.append(carried)
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("decay", [0.0, 1e-9, 0.3, 0.95, 0.9999, 0.999999])
@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 4096, 4097, 8192, 40_000])
def test_sums_are_those_of_the_loop(count, decay):
    generator = torch.Generator().manual_seed(count)
    for share in (1.0, 0.01, 0.0):
        drawn = torch.rand(2, count, dtype=torch.float64, generator=generator)
        weights = drawn[0] * (drawn[1] < share)
        got, want = decayed_sums(weights, decay), one_by_one(weights, decay)
        normal = want >= 1e-300
        assert got.shape == want.shape and got.dtype == torch.float64
        assert (got - want)[normal].abs().le(1e-12 * want[normal]).all() and (got[~normal] < 1e-299).all()


@pytest.mark.parametrize("decay", [0.3, 0.95])
def test_a_sum_that_underflows_is_zero_and_its_place_goes_by_position(decay):
    """One by one, a sum stops at a number too small to be multiplied down: it would go before what was never met."""
    far = 20_000
    sums = decayed_sums(torch.eye(1, far, dtype=torch.float64)[0], decay)
    last = int((sums > 0).sum())
    assert (sums[:last] >= torch.finfo(torch.float64).tiny).all() and (sums[last:] == 0).all() and 500 < last < far
    assert (sums[1:last] < sums[: last - 1]).all()
    assert bool(one_by_one(torch.eye(1, far)[0], decay)[-1] > 0) is (decay > 0.5)
    ids = [9, *range(10, 14), 9, *range(14, 14 + far)]  # the update's 9 stands behind four others
    chosen = OverlapTokens(1.0, decay).at_ratio((last + 3) / (far + 5))
    mask = chosen.known_before_start(ReusedTokens((1,), (far + 5,), None, ids))
    assert mask.nonzero()[:, 0].tolist() == [0, 1, 2, *range(4, last + 4)]


def test_top_mask_is_where_top_rows_are():
    generator = torch.Generator().manual_seed(3)
    for count in (0, 1, 5, 40):
        for values in (1, 3, 1000):  # few values: many ties
            scores = torch.randint(values, (count,), generator=generator).double()
            scores[: count // 5] = torch.inf
            for take in (-1, 0, 1, count // 3, count, count + 2):
                rows = top_mask(scores, take).nonzero()[:, 0]
                assert torch.equal(rows, top_rows(scores, take))


def test_rare_tokens_of_the_update_come_first_and_the_rest_by_position():
    #        update   fixed text: 7 stands twice, 9 once
    ids = [7, 9, 3, 1, 7, 2, 7, 4, 9, 5]
    reused = ReusedTokens((3,), (7,), None, ids)
    chosen = OverlapTokens(0.45, 0.0).known_before_start(reused)  # 3 of 7: the 9, then both 7
    assert chosen.tolist() == [False, True, False, True, False, True, False]
    behind = OverlapTokens(0.3, 0.9).known_before_start(reused)  # 2 of 7: the 9 and what follows it
    assert behind.tolist() == [False] * 5 + [True, True]
    lead = OverlapTokens(0.3, 0.0, lead=0.5).known_before_start(reused)
    assert lead.tolist() == [True] + [False] * 4 + [True, False]
    nothing = replace(reused, token_ids=())
    assert OverlapTokens(0.3).known_before_start(nothing).tolist() == [True, True] + [False] * 5
    assert OverlapTokens(0.3).known_before_start(ReusedTokens()).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "word"), [((1.5,), "recompute_ratio"), ((0.1, 1.0), "decay"), ((0.1, 0.5, 2), "lead")]
)
def test_arguments_out_of_range_are_refused(arguments, word):
    with pytest.raises(PolicyError, match=word):
        OverlapTokens(*arguments)


def test_it_serves_and_all_tokens_are_recompute(model):
    exact = ReuseEngine(model, load_policy("recompute"), MemoryChunkStore()).prefill(prompt(13, 5))
    errors, fixed = [], 6 + 23 + 31 + 17
    for ratio in (0.0, 0.3, 1.0):
        policy = replace(load_policy("cacheslide_first_turn"), correction=OverlapTokens().at_ratio(ratio))
        engine = ReuseEngine(model, policy, MemoryChunkStore())
        engine.build(prompt(7, 3))
        state = engine.prefill(prompt(13, 5))
        assert state.receipt.tokens_recomputed == tokens_of_ratio(ratio, fixed)
        errors.append(float((state.logits - exact.logits).abs().max()))
    assert errors[2] < 1e-4 < errors[0]
