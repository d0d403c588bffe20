"""Time to first token, with the systems taking turns in one process so that drift hits all of them alike."""

import random
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from tqdm import tqdm

from harness.backends.responders import Responder
from harness.quiet import Watch
from harness.results.records import RecordWriter, guarded
from harness.scoring import question_records
from harness.systems import System
from harness.tasks.example import TaskExample


def measure_latency(
    sessions: Iterable[tuple[Responder, Sequence[System]]],
    systems: Sequence[System],
    examples: Sequence[TaskExample],
    writer: RecordWriter,
    warmups: int,
    repeats: int,
    seed: int,
    max_new_tokens: int = 8,
    progress: str | None = "latency",
) -> None:
    """One record per example: for every system `repeats` TTFT samples, its receipt and answers.

    A round times every system once, in random order, so that other load affects all of them; `quiet` holds each round's
    reading (`harness.quiet`), by session.

    `warmups` uncounted rounds over all systems precede the first example of a session. The last repeat's answers
    give the accuracy that stands beside the times (gate, then time). Systems of several sessions (vLLM by itself,
    vLLM with the connector) take turns within their session; a record is written once all sessions have run.
    """
    todo = [e for e in examples if e.id not in writer.done]
    parts: dict[str, dict[str, Any]] = {}
    for responder, some in sessions if todo else ():
        for i, example in enumerate(tqdm(todo, desc=progress, disable=progress is None, mininterval=1)):
            if example.id in writer.done:  # it failed in another session
                continue
            part = parts.setdefault(example.id, _empty(responder, example))
            last = {s.name for s in systems} == {*part["systems"], *(s.name for s in some)}
            work = partial(_one, responder, some, example, part, 0 if i else warmups, repeats, seed, max_new_tokens)
            guarded(writer, example.id, work, keep=last)


def _empty(responder: Responder, example: TaskExample) -> dict[str, Any]:
    prompt = responder.backend.prompt(example.segments, example.questions[0].text)
    return {"task": example.task, "tokens": len(prompt), "build": {}, "systems": {}, "quiet": []}


def _one(responder, systems, example, part, warmups, repeats, seed, max_new_tokens) -> dict[str, Any]:
    """The example's record: `part` extended by these systems."""
    built = responder.fill([example], systems)
    out: dict[str, dict[str, Any]] = {s.name: {"ttft_seconds": []} for s in systems}
    order, rng, rounds = list(systems), random.Random(f"{seed}-{example.id}"), []
    watch = None
    for turn in range(warmups + repeats):
        rng.shuffle(order)
        if turn == warmups:
            watch = Watch()
        for system in order:
            last = turn == warmups + repeats - 1
            response = responder.first_token(system, example, max_new_tokens, answer=last)
            if turn >= warmups:
                out[system.name]["ttft_seconds"].append(response.seconds)
            if last:
                questions = question_records(example, response.texts)
                out[system.name] |= {"receipt": response.receipts[0], "questions": questions}
        if watch is not None:
            rounds.append(watch.lap())
    part["build"] |= built
    part["systems"] |= out
    part["quiet"].append({"systems": list(out), "rounds": rounds})
    return part
