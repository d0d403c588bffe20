"""Throughput under a closed loop: B clients, each sending its next request when the last one is answered."""

from collections.abc import Iterable, Sequence

from tqdm import tqdm

from harness.responders import Responder
from harness.results.records import RecordWriter, guarded
from harness.systems import System
from harness.tasks.example import TaskExample


def measure_throughput(
    sessions: Iterable[tuple[Responder, Sequence[System]]],
    examples: Sequence[TaskExample],
    writer: RecordWriter,
    batches: Sequence[int],
    max_new_tokens: int = 8,
    progress: str | None = "throughput",
) -> None:
    """One record per system and batch size, over the same requests (one question each).

    Caches are filled beforehand and not timed.
    """
    for responder, systems in sessions:
        responder.fill(examples, systems)
        todo = [(batch, system) for batch in batches for system in systems]
        for batch, system in tqdm(todo, desc=progress, disable=progress is None, mininterval=1):
            guarded(
                writer,
                f"{system.name}-{batch}",
                lambda responder=responder, batch=batch, system=system: _one(
                    responder, system, examples, batch, max_new_tokens
                ),
            )


def _one(responder, system, examples, batch, max_new_tokens) -> dict:
    requests, elapsed = responder.closed_loop(system, examples, batch, max_new_tokens)
    return {
        "system": system.name,
        "batch": batch,
        "elapsed_seconds": elapsed,
        "qps": len(requests) / elapsed,
        "qps_correct": sum(r["question"]["success"] for r in requests) / elapsed,
        "row_layer_share": sum(r["receipt"]["row_layer_share"] for r in requests) / len(requests),
        "requests": requests,
    }
