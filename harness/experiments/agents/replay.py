"""Teacher-forced replay: every variant serves the same recorded turns, alternating within each step.

A variant is a system, or a system with one setting changed. Each has its own chunk store from the
episode's first turn on, so that its reuse errors carry over to its later turns and no variant reads the chunks of
another.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

from tqdm import tqdm

from cacheslide.policies.base import ReusePolicy
from harness.agents.completer import Completion, Request
from harness.agents.in_process import InProcess
from harness.agents.loop import Episode, Step, Stops, run_episode
from harness.agents.oracle import oracle
from harness.agents.registry import entry
from harness.agents.sandbox import missing
from harness.backends.reference import EngineSettings, ReferenceBackend
from harness.backends.tokens import Tokens
from harness.metrics.answers import token_f1
from harness.quiet import Watch
from harness.results.records import RecordWriter, guarded

LONG = Stops(turns=400)


@dataclass(frozen=True)
class Variant:
    """One compared setting. `generations` as in `InProcess`."""

    name: str
    title: str
    policy: ReusePolicy
    generations: int = 0

    def serve(self, backend: ReferenceBackend, settings: EngineSettings) -> InProcess:
        """A completer with its own empty chunk store."""
        return InProcess(backend, self.policy, settings=settings, generations=self.generations)


def record(agent: str, count: int, seed: int, **options: Any) -> tuple[list[Any], list[Episode]]:
    """Tasks of the test split and the oracle's episodes on them; none if it runs code and there is no sandbox."""
    if agent == "swe_agent" and missing():
        return [], []
    tasks, episodes = list(entry(agent).tasks("test", seed, count, **options)), []
    for task in tasks:
        with closing(entry(agent).agent(task)) as at_work:
            episodes.append(run_episode(at_work, oracle(agent), LONG))
    return tasks, episodes


def request_of(backend: Tokens, episode: Episode, step: Step) -> Request:
    """The step's prompt; the answer is limited to the recorded one's length and its end token."""
    return Request(episode.task_id, step.index, step.segments, len(backend.encode(step.completion.text)) + 1)


def call_f1(own: str, forced: str) -> float:
    """Token F1 of the call's arguments; 0 for another tool, 1 for the same call without arguments."""
    (tool, _, given), (wanted, _, right) = (x.strip().partition(" ") for x in (own, forced))
    if tool != wanted:
        return 0.0
    return token_f1(given, [right]) if right else float(not given)


def step_record(step: Step, own: Completion) -> dict[str, Any]:
    """One system's record of one step."""
    kept = ("tokens", "tokens_reused", "tokens_recomputed", "chunks_hit", "generation", "build_row_layers", "build_s")
    return {
        "right": float(own.text.strip() == step.completion.text.strip()),
        "f1": call_f1(own.text, step.completion.text),
        "text": own.text,
        "ttft_s": own.ttft_s,
        "total_s": own.total_s,
        "row_layers": sum(own.receipt["tokens_per_layer"]),
        "layers": len(own.receipt["tokens_per_layer"]),
        **{k: own.receipt[k] for k in kept},
    }


def replay_variants(
    backend: ReferenceBackend,
    variants: Sequence[Variant],
    episodes: Iterable[Episode],
    writer: RecordWriter,
    settings: EngineSettings,
    seed: int,
    tasks: Mapping[str, Any] | None = None,
    progress: str | None = "replay",
) -> None:
    """Write one record per episode, with a reading of `harness.quiet` per step.

    With `tasks` (by id), every variant also runs the agent on its own outputs.
    """
    for episode in tqdm(list(episodes), desc=progress, disable=progress is None, mininterval=1):
        work = partial(_one, backend, variants, episode, settings, seed, (tasks or {}).get(episode.task_id))
        guarded(writer, f"{episode.agent}/{episode.task_id}", work)


def _one(backend, variants, episode, settings, seed, task) -> dict[str, Any]:
    served = {v.name: v.serve(backend, settings) for v in variants}
    rows: dict[str, list] = {v.name: [] for v in variants}
    order, rng, quiet = list(served), random.Random(f"{seed}-{episode.task_id}"), []
    watch = Watch()
    for step in episode.steps:
        request = request_of(backend, episode, step)
        rng.shuffle(order)
        for name in order:
            rows[name].append(step_record(step, served[name].complete(request)))
        quiet.append(watch.lap())
    out = {"agent": episode.agent, "forced": [s.completion.text for s in episode.steps], "systems": rows}
    out["quiet"] = quiet
    return out if task is None else out | {"own": _own(backend, variants, episode.agent, task, settings, rng)}


def _own(backend, variants, agent, task, settings, rng) -> dict[str, Any]:
    """Every variant's free-running episode: an empty chunk store, its own outputs, tools executed."""
    out = {}
    for v in rng.sample(list(variants), len(variants)):
        with closing(entry(agent).agent(task)) as at_work:
            done = run_episode(at_work, v.serve(backend, settings))
        out[v.name] = {"score": done.score, "success": done.success, "steps": len(done.steps), "stop": done.stop}
    return out
