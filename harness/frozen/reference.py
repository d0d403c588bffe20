"""The fixed request set in the plain-PyTorch host: every system, with its turns one by one, packed and as histories."""

import hashlib
from typing import Any

import torch

from cacheslide.core.engine import Prefilled, ReuseEngine
from cacheslide.core.prompt_file import load_tokenizer
from cacheslide.models.reference import ReferenceDecoder
from cacheslide.policies.registry import load_policy, policy_names
from cacheslide.store import MemoryChunkStore
from harness.frozen.texts import TURNS, prompt

LAYER, CHUNK, ANSWER = 2, 48, 6


def outcome(engine: ReuseEngine, state: Prefilled) -> dict[str, Any]:
    """Receipt, greedy tokens, and the bits of every row's K and V and of the last row's logits."""
    bits, rows = hashlib.sha256(), torch.arange(state.length)
    for layer in range(engine.model.num_layers):
        for tensor in state.kv.read(layer, rows):
            bits.update(tensor.contiguous().numpy().tobytes())
    bits.update(state.logits.contiguous().numpy().tobytes())
    receipt = state.receipt.as_dict()
    tokens = engine.generate(state, state.logits, ANSWER, frozenset())
    return {"receipt": receipt, "tokens": tokens, "bits": bits.hexdigest()}


def run(path: str) -> dict[str, Any]:
    """Outcomes by "system/turn", for the checkpoint folder `path`."""
    model, tokenizer = ReferenceDecoder.from_pretrained(path), load_tokenizer(path)
    prompts, out = [prompt(tokenizer, turn) for turn in range(TURNS)], {}
    for name in policy_names():
        policy = load_policy(name).at_layer(LAYER)
        engine = ReuseEngine(model, policy, MemoryChunkStore(), chunk_size=CHUNK)
        engine.build(prompts[0])
        for turn, asked in enumerate(prompts):
            out[f"{name}/{turn}"] = outcome(engine, engine.prefill(asked, room=ANSWER))
        for turn, state in enumerate(engine.prefill_batch(prompts, room=ANSWER)):
            out[f"{name}/packed/{turn}"] = outcome(engine, state)
    return out | _histories(model, prompts)


def _histories(model: ReferenceDecoder, prompts: list) -> dict[str, Any]:
    """Outcomes of turns that reuse the retained KV, corrected or not, of the prompt served before."""
    policy, out = load_policy("cacheslide_first_turn").at_layer(LAYER), {}
    engine = ReuseEngine(model, policy, MemoryChunkStore(), chunk_size=CHUNK, corrected=MemoryChunkStore())
    for turn, asked in enumerate(prompts):
        state = engine.prefill(asked, room=ANSWER)
        retained = engine.retain(state, asked, limit=2)
        done = outcome(engine, state)
        out[f"history/{turn}"] = done | {"kept": [retained.copied, retained.encoded, retained.generation]}
    return out
