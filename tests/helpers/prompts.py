"""Prompts in segments, the chunks that a system encodes for them, and a dense oracle."""

import torch

from cacheslide.core.engine import ReuseEngine
from cacheslide.core.keys import ContentKeying, FixedChainKeying
from cacheslide.core.placement import Placement
from cacheslide.core.prompt import Prompt, Role, Segment
from cacheslide.models.adapter import RowGroup
from cacheslide.policies.base import ReusePolicy
from cacheslide.policies.encodings import ENCODINGS, Isolated
from cacheslide.store import MemoryChunkStore
from tests.helpers.token_ids import random_ids


def prompt(updated: int, seed: int, question: int = 5, fixed=(23, 31, 17)) -> Prompt:
    """system | updated | three fixed segments | question; the fixed text does not depend on `seed`."""
    parts = [Segment(random_ids(6, 0), Role.REUSE), Segment(random_ids(updated, seed), Role.RECOMPUTE)]
    parts += [Segment(random_ids(n, 50 + i), Role.REUSE) for i, n in enumerate(fixed)]
    return Prompt((*parts, Segment(random_ids(question, seed + 1), Role.RECOMPUTE)))


def chain(correction, encoding="fixed_chain", rotation="delta") -> ReusePolicy:
    return ReusePolicy("p", "P", FixedChainKeying(), ENCODINGS[encoding], Placement(rotation), correction)


def isolated(correction, rotation="delta") -> ReusePolicy:
    return ReusePolicy("p", "P", ContentKeying(), Isolated(), Placement(rotation), correction)


def dense(model, ids, positions):
    """Plain forward: per layer inputs, k, v of all rows."""
    n = len(ids)
    rows, kv = torch.arange(n), model.new_kv(n)
    hidden, trace = model.embed(ids), []
    for layer in range(model.num_layers):
        q, k, v = model.qkv(layer, hidden, positions)
        kv.write(layer, rows, k, v)
        trace.append((hidden, k, v))
        hidden = model.finish(layer, hidden, model.attend(layer, q, [RowGroup(kv, rows)]))
    return trace, hidden


def oracle(model, ids, positions, from_layer, resting, placed):
    """Dense forward over all rows in which, from `from_layer` on, the resting rows' K/V are replaced by `placed`."""
    n = len(ids)
    rows, kv = torch.arange(n), model.new_kv(n)
    hidden = model.embed(ids)
    for layer in range(model.num_layers):
        q, k, v = model.qkv(layer, hidden, positions)
        if layer >= from_layer and len(resting):
            k, v = k.clone(), v.clone()
            k[resting], v[resting] = placed[layer][0], placed[layer][1]
        kv.write(layer, rows, k, v)
        hidden = model.finish(layer, hidden, model.attend(layer, q, [RowGroup(kv, rows)]))
    return kv, model.logits(hidden[-1:])[0]


def run(model, policy, before, now, chunk_size=16):
    engine = ReuseEngine(model, policy, MemoryChunkStore(), chunk_size=chunk_size)
    engine.build(before)
    request, _, _ = engine._prepare(now, 0, 0)
    return engine, request, engine.prefill(now)


def placed_cache(model, request, resting_index):
    return [request.source.layer(layer, resting_index) for layer in range(model.num_layers)]
