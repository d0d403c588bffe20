"""Prompt Cache beyond the slots that its schema gives."""

from dataclasses import replace

from cacheslide import ReuseEngine, load_policy
from cacheslide.core.placement import Placement
from cacheslide.store import MemoryChunkStore
from tests.helpers.prompts import prompt


def test_prompt_cache_misses_when_a_slot_is_outgrown(model):
    policy = replace(load_policy("prompt_cache"), placement=Placement("stored", slot=64))
    engine = ReuseEngine(model, policy, MemoryChunkStore(), chunk_size=16)
    engine.build(prompt(7, 3))
    assert engine.prefill(prompt(64, 5)).receipt.chunks_hit == 7
    outgrown = engine.prefill(prompt(65, 5)).receipt
    assert outgrown.chunks_hit == 1  # the system prompt sits before the slot
