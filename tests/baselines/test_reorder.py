"""Reordering: another prompt than was given, of which all fixed text is a prefix."""

import pytest
import torch

from baselines.reorder import updated_last
from cacheslide.core.engine import ReuseEngine
from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.errors import PolicyError
from cacheslide.policies.registry import load_policy
from cacheslide.store import MemoryChunkStore
from tests.helpers.prompts import prompt
from tests.helpers.token_ids import random_ids

NOW = prompt(13, 5)


def test_updated_text_goes_behind_fixed_text_and_the_question_stays_last():
    system, notes, *fixed, question = NOW.segments
    later = Segment(random_ids(4, 9), Role.RECOMPUTE)
    moved = updated_last(Prompt((system, notes, fixed[0], later, *fixed[1:], question)))
    assert moved.segments == (system, *fixed, notes, later, question)
    assert updated_last(moved) == moved
    with pytest.raises(PolicyError, match="must begin with fixed text"):
        updated_last(Prompt((notes, *fixed)))


def test_it_is_exact_for_the_prompt_it_makes_and_another_one_than_recompute(model):
    exact = ReuseEngine(model, load_policy("recompute"), MemoryChunkStore())
    engine = ReuseEngine(model, load_policy("reorder"), MemoryChunkStore(), chunk_size=16)
    engine.build(prompt(7, 3))
    done = engine.prefill(NOW)
    assert done.receipt.tokens_reused == 6 + 23 + 31 + 17 and done.receipt.tokens_recomputed == 0
    assert done.receipt.tokens_per_layer == [13 + 5] * model.num_layers
    torch.testing.assert_close(done.logits, exact.prefill(updated_last(NOW)).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(done.logits, exact.prefill(NOW).logits, atol=1e-2)


def test_a_question_asked_behind_the_context_is_one_asked_with_it(model):
    """Answers are measured by prefilling the context once: the question is not moved in front of the updated text."""
    engine = ReuseEngine(model, load_policy("reorder"), MemoryChunkStore(), chunk_size=16)
    engine.build(prompt(7, 3))
    context, question = Prompt(NOW.segments[:-1]), NOW.segments[-1].token_ids
    state = engine.prefill(context, following=len(question), room=len(question))
    torch.testing.assert_close(engine.extend(state, question), engine.prefill(NOW).logits, atol=1e-4, rtol=1e-4)
