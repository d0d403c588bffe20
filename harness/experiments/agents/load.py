"""Agents under load: TTFT and throughput with n agents at once, with beams, and throughput over time (figs 11, 13).

Closed loops of teacher-forced agents on the in-process engine, which batches all waiting requests (`Together`): all
systems serve exactly the same requests, in turns, and a ratio is taken within one repeat (each with its reading of
`harness.quiet`). Chunks of the agents' first prompts are stored before timing starts, as in a server that has been
running; later ones are stored during the run, and that work delays waiting requests.
"""

import random
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from tqdm import tqdm

from harness.agents.completer import Completer, Completion, Request
from harness.agents.in_process import InProcess
from harness.agents.loop import Episode
from harness.agents.registry import entry
from harness.agents.trace import Forced
from harness.backends.reference import EngineSettings, ReferenceBackend
from harness.backends.tokens import Tokens
from harness.experiments.agents.replay import LONG, Variant, request_of
from harness.load import Closed, Done, drive
from harness.load.driver import Together
from harness.quiet import watched
from harness.results.records import RecordWriter, guarded


class Watched(Forced):
    """A teacher-forced completer that records every request's times, in seconds after `begin`."""

    def __init__(self, inner: Any, episodes: Sequence[Episode], max_tokens: dict[tuple[str, int], int]) -> None:
        super().__init__(inner, episodes)
        self.max_tokens, self.begin, self.done = max_tokens, time.perf_counter(), []

    def complete(self, request: Request) -> Completion:
        """See `Forced`; an answer may be as long as the recorded one."""
        start = time.perf_counter() - self.begin
        key = request.session, request.step
        out = super().complete(Request(*key, request.segments, self.max_tokens[key], request.stop))
        end = time.perf_counter() - self.begin
        self.done.append(Done(start, start, end, self.own[key].agrees, out.ttft_s, len(out.token_s)))
        return out


def closed_loop(
    backend: ReferenceBackend,
    variant: Variant,
    tasks: Sequence[Any],
    episodes: Sequence[Episode],
    concurrent: int,
    settings: EngineSettings,
) -> list[Done]:
    """The requests of `episodes` of `concurrent` agents at a time, in order of completion."""
    inner = variant.serve(backend, settings)
    for episode in episodes:
        inner.engine.build(backend.prompt(episode.steps[0].segments))
    return loop_on(Together(inner), backend, tasks, episodes, concurrent)


def loop_on(
    completer: Completer, tokens: Tokens, tasks: Sequence[Any], episodes: Sequence[Episode], concurrent: int
) -> list[Done]:
    """As `closed_loop`, on any completer; `tokens` counts the recorded answers' tokens."""
    limits = {(e.task_id, s.index): request_of(tokens, e, s).max_tokens for e in episodes for s in e.steps}
    watched = Watched(completer, episodes, limits)
    drive(tasks, entry(episodes[0].agent).agent, watched, Closed(concurrent), LONG)
    return watched.done


def beams(
    backend: ReferenceBackend, variant: Variant, episode: Episode, width: int, settings: EngineSettings, branch: bool
) -> list[Done]:
    """One agent whose requests each use `width` beams.

    With `branch`, a beam search over one prefill (`backends.beams`). Without, `width` copies of the request in one
    packed run: the reading in which the beam width is the batch size.
    """
    inner: InProcess = variant.serve(backend, settings)
    inner.engine.build(backend.prompt(episode.steps[0].segments))
    out, begin = [], time.perf_counter()
    for step in episode.steps:
        request, start = request_of(backend, episode, step), time.perf_counter() - begin
        got = inner.beam(request, width) if branch else inner.complete_batch([request] * width)[0]
        right = got.text.strip() == step.completion.text.strip()
        out.append(Done(start, start, time.perf_counter() - begin, right, got.ttft_s, len(got.token_s)))
    return out


def measure_load(
    backend: ReferenceBackend,
    variants: Sequence[Variant],
    tasks: Sequence[Any],
    episodes: Sequence[Episode],
    writer: RecordWriter,
    settings: EngineSettings,
    seed: int,
    parallel: Sequence[int] = (),
    widths: Sequence[int] = (),
    repeats: int = 3,
    progress: str | None = "agents under load",
) -> None:
    """Records `mode`-`n`-`repeat`, each holding every system's requests; `mode` is parallel, beam or beam_batch."""
    cells = [("parallel", n) for n in parallel] + [(m, n) for m in ("beam", "beam_batch") for n in widths]
    todo = [(mode, n, r) for r in range(repeats) for mode, n in cells]
    for mode, n, r in tqdm(todo, desc=progress, disable=progress is None, mininterval=1):
        chosen = [(r * n + i) % len(episodes) for i in range(n)] if mode == "parallel" else [r % len(episodes)]
        some, own = [tasks[i] for i in chosen], [episodes[i] for i in chosen]

        def run(v: Variant, mode=mode, n=n, some=some, own=own) -> list[Done]:
            if mode == "parallel":
                return closed_loop(backend, v, some, own, n, settings)
            return beams(backend, v, own[0], n, settings, branch=mode == "beam")

        rng = random.Random(f"{seed}-{mode}-{n}-{r}")
        guarded(writer, f"{mode}-{n}-{r}", partial(_cell, {"mode": mode, "n": n, "repeat": r}, variants, run, rng))


def measure_series(
    backend: ReferenceBackend,
    variants: Sequence[Variant],
    tasks: Sequence[Any],
    episodes: Sequence[Episode],
    writer: RecordWriter,
    settings: EngineSettings,
    seed: int,
    concurrent: int = 8,
    slices: int = 4,
    progress: str | None = "throughput over time",
) -> None:
    """Records `slice`: the episodes of one slice are the same for all systems, which take turns slice by slice."""
    size = len(episodes) // slices
    for k in tqdm(range(slices), desc=progress, disable=progress is None, mininterval=1):
        part = slice(k * size, (k + 1) * size)

        def run(v: Variant, part=part) -> list[Done]:
            return closed_loop(backend, v, tasks[part], episodes[part], concurrent, settings)

        rng = random.Random(f"{seed}-{k}")
        guarded(writer, f"slice-{k}", partial(_cell, {"slice": k, "n": concurrent}, variants, run, rng))


def _cell(head, variants, run, rng) -> dict[str, Any]:
    out, quiet = {}, {}
    for v in rng.sample(list(variants), len(variants)):
        with watched() as quiet[v.name]:
            done = sorted(run(v), key=lambda d: d.end)
        out[v.name] = [[d.start, d.ttft_s, d.end, float(d.correct)] for d in done]
    return head | {"systems": out, "quiet": quiet}
