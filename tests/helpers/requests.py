"""Prefill requests of every kind."""

from cacheslide.core.engine import ReuseEngine
from cacheslide.policies.none import NoCorrection
from cacheslide.store import MemoryChunkStore
from tests.helpers.prompts import chain, prompt


def requests(model, rules, seeds=(5, 8, 11)):
    """A request a rule, of different lengths; None is one without anything cached."""
    made = []
    for i, (rule, seed) in enumerate(zip(rules, seeds, strict=False)):
        engine = ReuseEngine(model, chain(rule or NoCorrection()), MemoryChunkStore(), chunk_size=16)
        now = prompt(13 + 4 * i, seed, fixed=(23, 31 - i, 17 + i))
        if rule is not None:
            engine.build(prompt(7, 3, fixed=(23, 31 - i, 17 + i)))
        made.append(engine._prepare(now, 0, 0)[0])
    return made
