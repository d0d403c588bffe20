"""The rule that recomputes what the updated text speaks of."""

import random
from dataclasses import replace

import pytest
import torch

from cacheslide.core.engine import ReuseEngine
from cacheslide.core.reused import ReusedTokens
from cacheslide.errors import PolicyError
from cacheslide.policies.deviation import tokens_of_ratio
from cacheslide.policies.overlap import OverlapTokens
from cacheslide.policies.registry import load_policy
from cacheslide.store import MemoryChunkStore
from tests.test_prefill import prompt


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
        got = OverlapTokens(0.5, decay).overlap(reused)
        torch.testing.assert_close(got, torch.tensor(plain(reused, decay), dtype=torch.float64))


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
