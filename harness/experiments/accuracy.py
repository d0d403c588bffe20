"""Accuracy: every system answers the same questions about the same prompts, from caches of the turn before."""

import time
from collections.abc import Mapping, Sequence

import torch
from tqdm import tqdm

from cacheslide.encode import prefill_exact
from cacheslide.metrics import cksim
from cacheslide.policy import ReusePolicy, unchanged
from cacheslide.prompt import Prompt, Role
from cacheslide.store.base import ChunkStore
from harness.backend import EngineSettings, ReferenceBackend
from harness.results.records import RecordWriter, guarded
from harness.scoring import question_records
from harness.tasks.example import TaskExample


def evaluate(
    backend: ReferenceBackend,
    examples: Sequence[TaskExample],
    policies: Sequence[ReusePolicy],
    store: ChunkStore,
    settings: EngineSettings,
    writers: Mapping[str, RecordWriter],
    max_new_tokens: int = 8,
    similarity: bool = True,
    progress: str | None = "accuracy",
) -> None:
    """Write one record per example and policy to `writers[policy.name]`.

    The context is prefilled once per system and each question asked behind it, which gives exactly what
    prefilling context and question together would (tested), at a fraction of the cost. `similarity` adds CKSim
    per layer against an exact prefill of the same prompt.
    """
    for example in tqdm(examples, desc=progress, disable=progress is None, mininterval=1):
        exact = None
        for policy in policies:
            if example.id in writers[policy.name].done:
                continue
            if similarity and exact is None:
                exact = prefill_exact(backend.model, backend.prompt(example.segments).token_ids).k
            guarded(
                writers[policy.name],
                example.id,
                lambda example=example, policy=policy, exact=exact: _one(
                    backend, example, policy, store, settings, max_new_tokens, exact
                ),
            )


def _one(backend, example, policy, store, settings, max_new_tokens, exact) -> dict:
    engine = backend.engine(policy, store, settings)
    prompt = backend.prompt(example.segments)
    shortest = min(len(backend.encode(q.text)) for q in example.questions)
    started = time.perf_counter()
    state = engine.prefill(prompt, following=shortest, room=backend.room(example, max_new_tokens))
    seconds = time.perf_counter() - started
    compared = exact is not None and _aligned(policy)
    similar = _similarity(exact, state.kv.k, prompt) if compared else None
    return {
        "system": policy.name,
        "task": example.task,
        "metric": example.metric,
        "tokens": len(prompt),
        "reusable_share": prompt.reusable_share(),
        "prefill_seconds": seconds,
        "receipt": state.receipt.as_dict(),
        "cksim": similar,
        "questions": question_records(example, backend.answers(state, example, max_new_tokens)),
    }


def _aligned(policy: ReusePolicy) -> bool:
    """Whether row i of the system's KV is row i of plain recompute, at the same position."""
    return policy.transform is unchanged and not policy.placement.slot


def _similarity(exact: torch.Tensor, got: torch.Tensor, prompt: Prompt) -> list[float]:
    """CKSim per layer over the fixed rows, after reuse and correction."""
    rows = torch.cat(
        [
            torch.arange(start, start + len(s.token_ids))
            for s, start in zip(prompt.segments, prompt.starts, strict=True)
            if s.role is Role.REUSE
        ]
    )
    return cksim(exact[:, rows], got[:, rows]).mean(dim=1).tolist()
