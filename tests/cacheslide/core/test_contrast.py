"""What scores compare with: for a part of a prompt's chunks, and for chunks of another prompt than the one at hand."""

from dataclasses import replace

import pytest
import torch

from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.core.remembering import TokenKV
from tests.helpers.prompts import prompt
from tests.helpers.remembering import engine_of
from tests.helpers.token_ids import random_ids

QUESTION = Segment(random_ids(3, 9), Role.RECOMPUTE)


def contrast_of(engine, plan):
    return engine.encoder.contrast(engine.policy.encoding, plan)


def own(engine, key) -> TokenKV:
    return TokenKV.of_chunk(engine.store.get(key), engine.model.device)


@torch.inference_mode()
@pytest.mark.parametrize("encoding", ["in_prompt", "fixed_chain"])
def test_a_part_of_the_chunks_has_the_scores_of_all(model, encoding):
    """The other context ends with the last of them, not with the prompt's fixed text."""
    text, engine = prompt(9, 3), engine_of(model, encoding)
    engine.build(text)
    plan, computed = engine.plan(text), engine.encoder.row_layers
    few = contrast_of(engine, replace(plan, keys=plan.keys[1:3], chunks=plan.chunks[1:3]))
    for number, key in enumerate(plan.keys[1:3]):
        scores = few.scores(number, own(engine, key))
        torch.testing.assert_close(scores, engine.store.get(key).scores, atol=1e-5, rtol=1e-4)
        assert float(scores.max()) > 0.1
    rows = plan.chunks[2].end - (9 if encoding == "in_prompt" else 0)
    assert engine.encoder.row_layers - computed == rows * model.num_layers


@torch.inference_mode()
def test_a_chunk_of_another_prompt_is_compared_by_where_it_was_encoded(model):
    """The same fixed chain, updated text in front of it or behind its first chunk: the keys are the same."""
    fixed, more, updated = (
        Segment(random_ids(n, n), role) for n, role in ((6, Role.REUSE), (20, Role.REUSE), (9, Role.RECOMPUTE))
    )
    first, second = Prompt((updated, fixed, more, QUESTION)), Prompt((fixed, updated, more, QUESTION))
    engine = engine_of(model)
    engine.build(first)
    one, two = engine.plan(first), engine.plan(second)
    assert one.keys == two.keys
    moved = contrast_of(engine, two).scores(0, own(engine, one.keys[0]))
    torch.testing.assert_close(moved, engine.store.get(one.keys[0]).scores, atol=1e-5, rtol=1e-4)
    assert float(moved.min()) > 0.1
    engine = engine_of(model)
    engine.build(second)
    contrast = contrast_of(engine, one)
    assert (
        not contrast.scores(0, own(engine, one.keys[0])).any() and contrast.context is None
    )  # and nothing is computed
