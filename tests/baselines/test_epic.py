"""EPIC's LegoLink: the first tokens of every chunk but the prompt's first."""

import pytest
import torch

from baselines.epic import LINKS, LegoLink
from cacheslide.core.engine import ReuseEngine
from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.core.request_builder import RequestBuilder
from cacheslide.core.reused import ReusedTokens
from cacheslide.errors import PolicyError
from cacheslide.policies.registry import load_policy
from cacheslide.store import MemoryChunkStore
from tests.helpers.prompts import dense, isolated, oracle, placed_cache, prompt, run
from tests.helpers.token_ids import random_ids

BEFORE, NOW = prompt(7, 3), prompt(13, 5)


def test_the_prompts_first_chunk_is_left_alone_and_short_ones_are_taken_whole():
    rule = LegoLink(3)
    assert rule.known_before_start(ReusedTokens.of(4, 2, 5)).tolist() == [
        *[False] * 4, True, True, *[True] * 3, False, False,
    ]  # fmt: skip
    assert rule.known_before_start(ReusedTokens((2, 9), (4, 2))).tolist() == [*[True] * 3, False, True, True]
    behind = ReusedTokens((0,), (4,), before=64)  # the first chunk of the request, not of the prompt
    assert rule.known_before_start(behind).tolist() == [*[True] * 3, False]
    assert rule.known_before_start(ReusedTokens()).shape == (0,)


@pytest.mark.parametrize("k", LINKS)
def test_served_tokens_are_the_rules_and_equal_the_dense_forward(model, k):
    policy = load_policy(f"epic_{k}")
    _, request, done = run(model, policy, BEFORE, NOW, chunk_size=64)
    lengths = (23, 31, 17)
    want = [i for at, n in zip((19, 42, 73), lengths, strict=True) for i in range(at, at + min(k, n))]
    assert done.output.selected.tolist() == want and done.receipt.chunks_hit == 4
    index = (~torch.isin(request.reused, done.output.selected)).nonzero()[:, 0]
    placed = placed_cache(model, request, index)
    kv, logits = oracle(model, request.token_ids, request.positions, 0, request.reused[index], placed)
    torch.testing.assert_close(done.kv.k[:, : len(NOW)], kv.k, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(done.logits, logits, atol=1e-4, rtol=1e-4)


def test_links_as_long_as_every_chunk_are_recompute(model):
    _, hidden = dense(model, torch.tensor(NOW.token_ids), torch.arange(len(NOW)))
    _, _, done = run(model, isolated(LegoLink(31)), BEFORE, NOW, chunk_size=64)
    assert (done.logits - model.logits(hidden[-1:])[0]).abs().max() < 1e-4 and done.receipt.tokens_reused == 6


def test_a_prompt_that_begins_with_updated_text_has_no_first_chunk(model):
    now = Prompt((Segment(random_ids(5, 1), Role.RECOMPUTE), Segment(random_ids(20, 2), Role.REUSE), NOW.segments[-1]))
    engine = ReuseEngine(model, load_policy("epic_8"), MemoryChunkStore())
    engine.build(now)
    assert engine.prefill(now).output.selected.tolist() == list(range(5, 13))


def test_a_request_behind_a_prefix_knows_that_its_first_chunk_is_not_the_prompts(model):
    builder = RequestBuilder(model)
    requests = [builder.build((1, 2), range(at, at + 2), model.new_kv(at + 2), start=at) for at in (0, 3)]
    assert [r.runs.before for r in requests] == [0, 3]


def test_k_is_a_number_of_tokens_at_any_ratio():
    assert LegoLink(8).at_ratio(0.5) == LegoLink(8) and LegoLink(8).total_ratio is None
    with pytest.raises(PolicyError, match="k must be at least 0 tokens, not -1"):
        LegoLink(-1)
