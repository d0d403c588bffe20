"""Time to first token, with the systems taking turns in one process so that drift hits all of them alike."""

import gc
import random
import time
from collections.abc import Sequence

from tqdm import tqdm

from cacheslide.policy import ReusePolicy
from cacheslide.store.memory import MemoryChunkStore
from harness.backend import EngineSettings, ReferenceBackend
from harness.experiments.chunks import build_chunks
from harness.results.records import RecordWriter, guarded
from harness.scoring import question_records
from harness.tasks.example import TaskExample


def measure_latency(
    backend: ReferenceBackend,
    examples: Sequence[TaskExample],
    policies: Sequence[ReusePolicy],
    settings: EngineSettings,
    writer: RecordWriter,
    warmups: int,
    repeats: int,
    seed: int,
    max_new_tokens: int = 8,
    progress: str | None = "latency",
) -> None:
    """One record per example: for every system `repeats` TTFT samples, its receipt and answers.

    `warmups` uncounted rounds over all systems precede the first example of the process.

    TTFT runs from the tokenised prompt to the first answer token: lookup, load, placement, prefill, logits.
    The same run's answers give the accuracy that stands beside it (gate, then time).
    """
    todo = [e for e in examples if e.id not in writer.done]
    for i, example in enumerate(tqdm(todo, desc=progress, disable=progress is None, mininterval=1)):
        cold = 0 if i else warmups
        guarded(
            writer,
            example.id,
            lambda example=example, cold=cold: _one(
                backend, example, policies, settings, cold, repeats, seed, max_new_tokens
            ),
        )


def _one(backend, example, policies, settings, warmups, repeats, seed, max_new_tokens) -> dict:
    store = MemoryChunkStore()
    built = build_chunks(backend, [example], policies, store, settings, progress=None)
    context, first = backend.prompt(example.segments), example.questions[0]
    prompt = backend.prompt(example.segments, first.text)
    room = backend.room(example, max_new_tokens)
    engines = {p.name: backend.engine(p, store, settings) for p in policies}
    out: dict[str, dict] = {p.name: {"ttft_seconds": []} for p in policies}
    order, rng = list(engines), random.Random(f"{seed}-{example.id}")
    for turn in range(warmups + repeats):
        rng.shuffle(order)
        for name in order:
            gc.collect()
            started = time.perf_counter()
            state = engines[name].prefill(prompt, room=room)
            int(state.logits.argmax())
            seconds = time.perf_counter() - started
            if turn >= warmups:
                out[name]["ttft_seconds"].append(seconds)
            if turn == warmups + repeats - 1:
                out[name] |= _answers(backend, engines[name], state, example, context, max_new_tokens)
    return {"task": example.task, "tokens": len(prompt), "build": built, "systems": out}


def _answers(backend, engine, state, example, context, max_new_tokens) -> dict:
    """Answers from the timed state: its question's rows are dropped and every question asked behind the context."""
    receipt = state.receipt.as_dict()
    plan = engine.plan(context)
    state.length, state.next_position = len(plan.prompt), plan.positions[-1] + 1
    return {
        "receipt": receipt,
        "questions": question_records(example, backend.answers(state, example, max_new_tokens)),
    }
