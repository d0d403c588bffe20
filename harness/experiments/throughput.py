"""Throughput under a closed loop: B clients, each sending its next request when the last one is answered."""

import time
from collections.abc import Sequence

from tqdm import tqdm

from cacheslide.policy import ReusePolicy
from cacheslide.store.memory import MemoryChunkStore
from harness.backend import EngineSettings, ReferenceBackend
from harness.experiments.chunks import build_chunks
from harness.results.records import RecordWriter, guarded
from harness.scoring import question_record
from harness.tasks.example import TaskExample


def measure_throughput(
    backend: ReferenceBackend,
    examples: Sequence[TaskExample],
    policies: Sequence[ReusePolicy],
    settings: EngineSettings,
    writer: RecordWriter,
    batches: Sequence[int],
    max_new_tokens: int = 8,
    progress: str | None = "throughput",
) -> None:
    """One record per system and batch size, over the same requests (one question each).

    The backend serves in rounds: all waiting clients are prefilled in one packed run and their answers decoded;
    then every client sends its next request. Caches are filled beforehand and not timed.
    """
    store = MemoryChunkStore()
    build_chunks(backend, examples, policies, store, settings, progress=progress and "throughput, chunk caches")
    todo = [(batch, policy) for batch in batches for policy in policies]
    for batch, policy in tqdm(todo, desc=progress, disable=progress is None, mininterval=1):
        engine = backend.engine(policy, store, settings)
        guarded(
            writer,
            f"{policy.name}-{batch}",
            lambda batch=batch, engine=engine: _closed_loop(backend, engine, examples, batch, max_new_tokens),
        )


def _closed_loop(backend, engine, examples, batch, max_new_tokens) -> dict:
    prompts = [backend.prompt(e.segments, e.questions[0].text) for e in examples]
    engine.prefill_batch(prompts[:1])  # warm-up, not counted
    requests, shares, started = [], [], time.perf_counter()
    for at in range(0, len(prompts), batch):
        sent = time.perf_counter()
        states = engine.prefill_batch(prompts[at : at + batch], room=max_new_tokens)
        for state in states:
            int(state.logits.argmax())  # the first token exists only once the device has finished
        first = time.perf_counter()
        for example, state in zip(examples[at : at + batch], states, strict=True):
            ids = engine.generate(state, state.logits, max_new_tokens, backend.stop_ids())
            text = backend.tokenizer.decode(ids, skip_special_tokens=True).strip()
            now = time.perf_counter()
            requests.append(
                {
                    "example": example.id,
                    "ttft_seconds": first - sent,
                    "finished_seconds": now - started,
                    "decode_tokens": len(ids),
                    "rows_reused": state.receipt.rows_reused,
                    "question": question_record(example, example.questions[0], text),
                }
            )
            shares.append(state.receipt.row_layer_share)
    elapsed = time.perf_counter() - started
    return {
        "system": engine.policy.name,
        "batch": batch,
        "elapsed_seconds": elapsed,
        "qps": len(requests) / elapsed,
        "qps_correct": sum(r["question"]["success"] for r in requests) / elapsed,
        "row_layer_share": sum(shares) / len(shares),
        "requests": requests,
    }
