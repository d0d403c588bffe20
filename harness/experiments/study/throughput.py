"""Throughput under a closed loop: B clients, each sending its next request when the last one is answered.

The requests are cut into slices of whole rounds; within a slice the systems of a session take turns, so that
other load affects all of them. A slice is a separate closed loop, with its reading of `harness.quiet`.
"""

import random
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from tqdm import tqdm

from cacheslide.errors import CacheSlideError
from harness.backends.responders import Responder
from harness.quiet import watched
from harness.results.records import RecordWriter
from harness.systems import System
from harness.tasks.example import TaskExample

SLICES = 4


def measure_throughput(
    sessions: Iterable[tuple[Responder, Sequence[System]]],
    examples: Sequence[TaskExample],
    writer: RecordWriter,
    batches: Sequence[int],
    max_new_tokens: int = 8,
    progress: str | None = "throughput",
    seed: int = 0,
) -> None:
    """One record per system and batch size, over the same requests (one question each).

    Caches are filled beforehand and not timed. If a system fails at a batch size, the others continue.
    """
    for responder, systems in sessions:
        responder.fill(examples, systems)
        for batch in tqdm(batches, desc=progress, disable=progress is None, mininterval=1):
            todo = [s for s in systems if f"{s.name}-{batch}" not in writer.done]
            _batch(responder, todo, examples, batch, writer, max_new_tokens, random.Random(f"{seed}-{batch}"))


def slices_of(count: int, batch: int, slices: int = SLICES) -> list[range]:
    """`count` requests cut into at most `slices` runs of whole rounds of `batch`, as equal as possible."""
    rounds = -(-count // batch)
    cuts = [min(count, batch * (rounds * i // slices)) for i in range(slices + 1)]
    return [range(a, b) for a, b in pairwise(cuts) if b > a]


def _batch(responder, systems, examples, batch, writer, max_new_tokens, rng) -> None:
    parts: dict[str, list[tuple[list, float, dict]]] = {s.name: [] for s in systems}
    order = list(systems)
    for part in slices_of(len(examples), batch):
        rng.shuffle(order)
        for system in list(order):
            try:
                with watched() as quiet:
                    requests, seconds = responder.closed_loop(
                        system, examples[part.start : part.stop], batch, max_new_tokens
                    )
            except CacheSlideError as error:
                writer.fail(f"{system.name}-{batch}", error)
                order.remove(system)
                del parts[system.name]
            else:
                parts[system.name].append((requests, seconds, quiet))
    for name, done in parts.items():
        writer.add({"id": f"{name}-{batch}", "system": name, "batch": batch, **_joined(done)})


def _joined(done: Sequence[tuple[list, float, dict]]) -> dict[str, Any]:
    """The slices as one loop: each begins where the one before has ended."""
    requests, elapsed = [], 0.0
    for some, seconds, _ in done:
        requests += [r | {"finished_seconds": elapsed + r["finished_seconds"]} for r in some]
        elapsed += seconds
    return {
        "elapsed_seconds": elapsed,
        "qps": len(requests) / elapsed,
        "qps_correct": sum(r["question"]["success"] for r in requests) / elapsed,
        "compute_fraction": sum(r["receipt"]["compute_fraction"] for r in requests) / len(requests),
        "slices": [len(some) for some, _, _ in done],
        "quiet": [quiet for _, _, quiet in done],
        "requests": requests,
    }
