"""Prefills that chunks wait for: which ones a step is given."""

from collections import deque
from collections.abc import Callable
from dataclasses import replace

from cacheslide.keys import ChunkKey
from cacheslide.vllm.index import ChunkIndex
from cacheslide.vllm.plans import EncodeJob, StepPlan

Reserve = Callable[[EncodeJob], tuple[ChunkKey, ...] | None]  # room for a job's chunks: the keys that leave for it


class EncodeJobs:
    """Waiting jobs in order of arrival; `budget` tokens a step, which one job may exceed."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._waiting: deque[tuple[EncodeJob, bool]] = deque()  # and whether it may not wait

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, job: EncodeJob, when: str) -> None:
        """Have a job done, unless it waits already; `when` as in `ServerOptions.encode`."""
        if all(job.keys != waiting.keys for waiting, _ in self._waiting):
            self._waiting.append((job, when == "now"))

    def emit(self, step: StepPlan, waited: int, index: ChunkIndex, reserve: Reserve) -> None:
        """Hand out jobs; the first `waited` come from earlier steps, the others go only if they may not wait."""
        budget, waiting = self.budget, deque()
        for number, (job, urgent) in enumerate(self._waiting):
            renewed = [key for key in job.keys if job.renew and index.generation(key)]
            missing = [key not in index or key in renewed for key in job.keys]
            tokens = job.tokens(missing)
            if not tokens:
                continue
            fits = tokens <= budget or not step.encodes
            if not urgent and not (fits and number < waited and (step.idle or not step.loads)):
                waiting.append((job, urgent))
                continue
            evict = reserve(job)
            if evict is not None:
                budget -= tokens
                index.set_exact(renewed)
                step.encodes.append(replace(job, evict=(*evict, *renewed)))
        self._waiting = waiting

    def clear(self) -> None:
        """Nothing is wanted any more."""
        self._waiting.clear()
