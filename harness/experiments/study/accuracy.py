"""Accuracy: every system answers the same questions about the same prompts, from caches of the previous turn."""

from collections.abc import Iterable, Mapping, Sequence

from tqdm import tqdm

from cacheslide.errors import CacheSlideError
from harness.backends.responders import Responder
from harness.results.records import RecordWriter, guarded
from harness.scoring import question_records
from harness.systems import System
from harness.tasks.example import TaskExample


def evaluate(
    sessions: Iterable[tuple[Responder, Sequence[System]]],
    examples: Sequence[TaskExample],
    writers: Mapping[str, RecordWriter],
    max_new_tokens: int = 8,
    progress: str | None = "accuracy",
    timed: bool = True,
) -> None:
    """Write one record per example and system to `writers[system.name]`.

    `receipt` is that of the first request, `receipts` holds all if a backend sends one per question. Without `timed`
    no seconds are recorded.
    """
    for responder, systems in sessions:
        for example in tqdm(examples, desc=progress, disable=progress is None, mininterval=1):
            todo = [s for s in systems if example.id not in writers[s.name].done]
            if not todo:
                continue
            try:
                responder.fill([example], todo)
            except CacheSlideError as error:
                for system in todo:
                    writers[system.name].fail(example.id, error)
            for system in todo:
                guarded(
                    writers[system.name],
                    example.id,
                    lambda responder=responder, example=example, system=system: _one(
                        responder, example, system, max_new_tokens, timed
                    ),
                )


def _one(responder: Responder, example: TaskExample, system: System, max_new_tokens: int, timed: bool) -> dict:
    response, prompt = responder.respond(system, example, max_new_tokens), responder.backend.prompt(example.segments)
    record = {
        "system": system.name,
        "task": example.task,
        "metric": example.metric,
        "tokens": len(prompt),
        "reusable_share": prompt.reusable_share(),
        "prefill_seconds": response.seconds if timed else None,
        "receipt": response.receipts[0],
        "cksim": response.cksim,
        "questions": question_records(example, response.texts),
    }
    return record | ({"receipts": response.receipts} if len(response.receipts) > 1 else {})
