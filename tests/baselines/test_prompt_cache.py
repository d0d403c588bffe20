"""Prompt Cache: modules encoded jointly are the schema's forward, and what happens beyond the slots it gives."""

from dataclasses import replace

import pytest
import torch

from baselines.joint_modules import JointModules, scaffold
from baselines.prompt_cache import SLOTS
from cacheslide import Prompt, ReuseEngine, Role, Segment, load_policy
from cacheslide.core.keys import ContentKeying
from cacheslide.core.placement import Placement
from cacheslide.errors import PolicyError
from cacheslide.policies.base import ReusePolicy
from cacheslide.store import MemoryChunkStore
from tests.helpers.prompts import dense, prompt
from tests.helpers.token_ids import random_ids

NAMES = ["prompt_cache", "prompt_cache_joint", *(f"prompt_cache_joint_{slot}" for slot in SLOTS)]
FIXED = 6 + 23 + 31 + 17


def served(model, policy, before, now, chunk_size=16):
    engine = ReuseEngine(model, policy, MemoryChunkStore(), chunk_size=chunk_size)
    engine.build(before)
    return engine, engine.prefill(now)


@pytest.mark.parametrize("name", ["prompt_cache", "prompt_cache_joint"])
def test_prompt_cache_misses_when_a_slot_is_outgrown(model, name):
    policy = replace(load_policy(name), placement=Placement("stored", slot=64))
    engine, done = served(model, policy, prompt(7, 3), prompt(64, 5))
    assert done.receipt.chunks_hit == 7
    outgrown = engine.prefill(prompt(65, 5)).receipt
    assert outgrown.chunks_hit == 1  # the system prompt sits before the slot


@pytest.mark.parametrize("name", NAMES[1:])
def test_the_slot_is_part_of_the_system(model, name):
    slot = load_policy(name).placement.slot
    assert slot == int(name.rpartition("_")[2] if name[-1].isdigit() else 256)
    engine, done = served(model, load_policy(name), prompt(7, 3), prompt(min(slot, 100), 5))
    assert done.receipt.tokens_reused == FIXED
    if 2 * slot < 400:  # the model has 512 positions
        assert engine.prefill(prompt(slot + 1, 5)).receipt.tokens_reused == 6


def test_the_scaffold_is_the_schema_with_placeholders():
    extra = (Segment(random_ids(9, 8), Role.RECOMPUTE), Segment(random_ids(3, 9), Role.RECOMPUTE))
    system, notes, first, *rest = prompt(13, 3).segments
    given = Prompt((system, notes, first, *extra, *rest))
    positions = Placement("stored", slot=8).positions(given)
    last = max(i for i, s in enumerate(given.segments) if s.role is Role.REUSE)
    made = scaffold(given, positions, last, 5)
    assert [len(s.token_ids) for s in made.segments] == [6, 16, 23, 16, 8, 31, 17]
    for segment, source in zip(made.segments, given.segments, strict=False):
        assert segment.role is source.role
        assert segment == source if source.role is Role.REUSE else set(segment.token_ids) == {5}
    fixed = [r for r, s in zip(given.starts, given.segments, strict=True) if s.role is Role.REUSE]
    assert [positions[r] for r in fixed] == [0, 22, 69, 100]  # a row of the scaffold is its position


@pytest.mark.parametrize("placeholder", [0, 7])
@pytest.mark.parametrize("chunk_size", [16, 1024])
def test_joint_encoding_is_the_dense_forward_over_the_schema(model, placeholder, chunk_size):
    """K and V of fixed text, wherever the turn's updated text differs, and nothing of that text."""
    policy = replace(load_policy("prompt_cache_joint_32"), encoding=JointModules(placeholder))
    engine, done = served(model, policy, prompt(7, 3), prompt(13, 5), chunk_size)
    ids = list(prompt(7, 3).token_ids)
    ids = torch.tensor(ids[:6] + [placeholder] * 32 + ids[13:-5])
    trace, _ = dense(model, ids, torch.arange(len(ids)))
    rows, at = [*range(6), *range(19, 90)], [*range(6), *range(38, 109)]
    for layer, (_, k, v) in enumerate(trace):
        torch.testing.assert_close(done.kv.k[layer, rows], k[at], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(done.kv.v[layer, rows], v[at], atol=1e-5, rtol=1e-4)
    assert done.receipt.tokens_per_layer == [13 + 5] * model.num_layers
    other = ReuseEngine(model, policy, MemoryChunkStore(), chunk_size=chunk_size)
    other.build(prompt(31, 9))  # the same slot
    for key in engine.plan(prompt(13, 5)).keys:
        torch.testing.assert_close(engine.store.get(key).k, other.store.get(key).k, atol=1e-5, rtol=1e-4)


def test_a_full_slot_of_placeholders_is_recompute(model):
    filled = Segment((0,) * 16, Role.RECOMPUTE)
    system, _, *rest = prompt(16, 3).segments
    now = Prompt((system, filled, *rest))
    _, hidden = dense(model, torch.tensor(now.token_ids), torch.arange(len(now)))
    _, done = served(model, load_policy("prompt_cache_joint_16"), prompt(7, 3), now)
    assert done.receipt.tokens_reused == FIXED
    assert (done.logits - model.logits(hidden[-1:])[0]).abs().max() < 1e-4


def test_a_module_is_another_one_behind_another_module_or_placeholder(model):
    policy = load_policy("prompt_cache_joint")
    engine, _ = served(model, policy, prompt(7, 3), prompt(13, 5))
    system, notes, first, second, *rest = prompt(13, 5).segments
    swapped = engine.prefill(Prompt((system, notes, second, first, *rest))).receipt
    assert swapped.chunks_hit == 1
    other = ReuseEngine(model, replace(policy, encoding=JointModules(3)), engine.store, chunk_size=16)
    assert other.prefill(prompt(13, 5)).receipt.chunks_hit == 0


def test_a_grown_schema_is_what_it_is_from_the_start(model):
    engine, _ = served(model, load_policy("prompt_cache_joint"), prompt(7, 3, fixed=(23, 31)), prompt(7, 3))
    grown = prompt(7, 3, fixed=(23, 31, 17))
    assert engine.build(grown) == 2
    fresh, _ = served(model, load_policy("prompt_cache_joint"), grown, grown)
    for key in fresh.plan(grown).keys:
        torch.testing.assert_close(engine.store.get(key).k, fresh.store.get(key).k, atol=1e-5, rtol=1e-5)


def test_what_joint_modules_need_is_checked():
    with pytest.raises(PolicyError, match="x: modules that are encoded jointly need the fixed-chain keying"):
        ReusePolicy("x", "X", ContentKeying(True), JointModules(), Placement("stored", 8))
    with pytest.raises(PolicyError, match="needs a placement with slots"):
        replace(load_policy("prompt_cache_joint"), placement=Placement("stored"))
    with pytest.raises(PolicyError, match="placeholder is a token id of at least 0, not -1"):
        JointModules(-1)
