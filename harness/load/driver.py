"""Runs episodes under an arrival process, each in a thread of its own, against any completer."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from cacheslide.errors import CacheSlideError, ConfigError
from harness.agents.agent import Agent
from harness.agents.completer import Completer, Completion, CompletionError, Request
from harness.agents.loop import Episode, Stops, run_episode
from harness.load.arrivals import Closed, Poisson, Replayed, Steady
from harness.load.measures import Done

Arrivals = Closed | Steady | Poisson | Replayed


class OneAtATime:
    """Serialises requests to a completer that serves one at a time (the in-process engine); times include waiting."""

    def __init__(self, inner: Completer) -> None:
        self.inner, self.system, self._lock = inner, inner.system, threading.Lock()

    def complete(self, request: Request) -> Completion:
        """The inner completer's answer; `token_s` and `total_s` include waiting."""
        begin = time.perf_counter()
        with self._lock:
            wait = time.perf_counter() - begin
            done = self.inner.complete(request)
        return _later(done, wait)


@dataclass
class _Waiting:
    request: Request
    since: float
    done: Completion | None = None
    error: CacheSlideError | None = None


class Together:
    """Batches waiting requests: whenever the engine is free, all requests that have arrived are served in one run.

    `inner` has `complete_batch`; at most `limit` requests go into one run. A request's times include waiting. A refused
    batch is served one by one, so that a bad request fails alone.
    """

    def __init__(self, inner: Any, limit: int = 64) -> None:
        if limit < 1:
            raise ConfigError(f"a run serves at least 1 request, not {limit}")
        self.inner, self.system, self.limit = inner, inner.system, limit
        self._queue: list[_Waiting] = []
        self._lock, self._engine = threading.Lock(), threading.Lock()

    def complete(self, request: Request) -> Completion:
        """The inner completer's answer; `token_s` and `total_s` include the wait for its run."""
        mine = _Waiting(request, time.perf_counter())
        with self._lock:
            self._queue.append(mine)
        while mine.done is None and mine.error is None:
            with self._engine:
                if mine.done is None and mine.error is None:
                    with self._lock:
                        batch, self._queue = self._queue[: self.limit], self._queue[self.limit :]
                    self._serve(batch)
        if mine.error is not None:
            raise mine.error
        return mine.done

    def _serve(self, batch: list[_Waiting]) -> None:
        begin = time.perf_counter()
        try:
            for waiting, done in zip(batch, self.inner.complete_batch([w.request for w in batch]), strict=True):
                waiting.done = _later(done, begin - waiting.since)
        except CacheSlideError as refused:
            if len(batch) == 1:
                batch[0].error = refused
                return
            for waiting in batch:
                self._serve([waiting])
        except BaseException as broken:  # a defect: no request may wait for ever
            for waiting in batch:
                waiting.error = waiting.error or CompletionError(f"the engine failed: {broken!r}")
            raise


def _later(done: Completion, wait: float) -> Completion:
    return replace(done, token_s=tuple(t + wait for t in done.token_s), total_s=done.total_s + wait)


@dataclass(frozen=True)
class Loaded:
    """The episodes in the order of their tasks, with due, start and end times."""

    episodes: list[Episode]
    done: list[Done]


def drive(
    tasks: Sequence[Any],
    make_agent: Callable[[Any], Agent],
    completer: Completer,
    arrivals: Arrivals,
    stops: Stops | None = None,
    limit: int = 64,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Loaded:
    """Run one episode per task.

    Parameters
    ----------
    tasks : sequence
    make_agent : callable
        Makes the agent for a task; construction counts towards the episode's time.
    completer : Completer
        Called from many threads; wrap one that is not thread-safe in `OneAtATime`.
    arrivals : Closed, Steady, Poisson or Replayed
    limit : int
        Maximum number of threads in an open loop; an episode due while all are busy starts late, and its latency
        includes the wait (`Done.due`).
    clock, sleep : callables
        Seconds.

    Raises
    ------
    ConfigError
        Without tasks, or if `limit` allows an open loop no thread.
    """
    if not tasks:
        raise ConfigError("no tasks to drive")
    if limit < 1:
        raise ConfigError(f"an open loop needs at least 1 thread, not {limit}")
    due = arrivals.times(len(tasks))
    workers = min(len(tasks), limit if due is not None else arrivals.concurrent)
    begin = clock()

    def one(task: Any, at: float | None) -> tuple[Episode, Done]:
        start = clock() - begin
        with closing(make_agent(task)) as agent:
            episode = run_episode(agent, completer, stops, clock)
        end = clock() - begin
        first = [s.completion.ttft_s for s in episode.steps if s.completion.ttft_s is not None]
        tokens = sum(len(s.completion.token_s) for s in episode.steps)
        timed = Done(
            start if at is None else min(at, start), start, end, episode.success, max(first, default=None), tokens
        )
        return episode, timed

    with ThreadPoolExecutor(workers) as pool:
        futures = []
        for i, task in enumerate(tasks):
            if due is not None and (wait := due[i] - (clock() - begin)) > 0:
                sleep(wait)
            futures.append(pool.submit(one, task, None if due is None else due[i]))
        results = [f.result() for f in futures]
    return Loaded([e for e, _ in results], [d for _, d in results])
