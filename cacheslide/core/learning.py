"""What a policy's memory takes from requests that were served exactly."""

from dataclasses import replace

from cacheslide.core.plan import Plan
from cacheslide.errors import StoreError
from cacheslide.models.adapter import KVBuffer, ModelAdapter
from cacheslide.policies.memory import Memory
from cacheslide.store.base import ChunkStore, Fits


def learn(model: ModelAdapter, memory: Memory, store: ChunkStore, plan: Plan, kv: KVBuffer, shape: Fits) -> int:
    """Give the plan's stored chunks the notes that `kv` adds; how many have new ones.

    Chunks in memory get them; a store that writes a chunk once keeps the notes that it was written with.

    Parameters
    ----------
    kv : KVBuffer
        Exact KV of the plan's prompt, up to its last chunk.
    shape : Fits
        Of the model's chunks: one of another shape, which no request reuses, learns nothing.
    """
    if not memory.name:
        return 0
    count = 0
    for number, (key, chunk) in enumerate(plan.keyed):
        try:
            held = store.fetch(key, shape, len(chunk)).chunk if store.contains(key) else None
        except StoreError:  # what cannot be read is computed anew, not learned of
            continue
        notes = None if held is None else memory.learn(model, plan, number, held, kv)
        if notes is not None:
            count += store.replace(key, replace(held, notes=notes))
    return count
