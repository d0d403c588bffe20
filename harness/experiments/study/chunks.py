"""Builds the chunk KV caches that evaluations read: the first step of the paper's pipeline."""

import time
from collections.abc import Sequence

from tqdm import tqdm

from cacheslide.policies.base import ReusePolicy
from cacheslide.store.base import ChunkStore
from harness.backends.reference import EngineSettings, ReferenceBackend
from harness.systems import recipes
from harness.tasks.example import TaskExample


def build_chunks(
    backend: ReferenceBackend,
    examples: Sequence[TaskExample],
    policies: Sequence[ReusePolicy],
    store: ChunkStore,
    settings: EngineSettings,
    progress: str | None = "chunk caches",
) -> dict[str, dict]:
    """Encode the previous turn of every example in every context the policies need.

    Returns, per recipe, the chunks and bytes written, the seconds it took, and the layers whose inputs are kept.
    Chunks already in the store are skipped, so an interrupted build resumes.
    """
    plans = recipes(policies)
    report = {
        name: {"chunks": 0, "bytes": 0, "seconds": 0.0, "layer_inputs": sorted(c)} for name, (_, c) in plans.items()
    }
    for example in tqdm(examples, desc=progress, disable=progress is None, mininterval=1):
        prompt = backend.prompt(example.previous)
        for name, (policy, capture) in plans.items():
            engine = backend.engine(policy, store, settings, capture)
            written, started = store.stats.bytes_written, time.perf_counter()
            report[name]["chunks"] += engine.build(prompt)
            report[name]["seconds"] += time.perf_counter() - started
            report[name]["bytes"] += store.stats.bytes_written - written
    return report
