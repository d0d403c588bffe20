"""Work of the frontier in processes: cells of one model on one prompt, the most urgent first, until a deadline."""

import heapq
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from time import monotonic
from typing import Any

from cacheslide.errors import CacheSlideError
from harness.backends.reference import ReferenceBackend
from harness.experiments.rules.frontier_cells import settings
from harness.experiments.wca.cells import Cell
from harness.experiments.wca.sweep import Caches, Job, measure_cell, open_backend, prompt_id, record_id
from harness.tasks.example import TaskExample


@dataclass(frozen=True)
class Task:
    """Cells `names` of the model in folder `model` on one prompt; `part` says what the records are for."""

    model: str
    part: str
    example: TaskExample
    names: tuple[str, ...]


@dataclass
class Waiting:
    """Tasks by urgency, a smaller number first; of equal urgency in the order they were added."""

    _heap: list[tuple[int, int, Task]] = field(default_factory=list)
    _added: int = 0

    def add(self, urgency: int, task: Task) -> None:
        """Add a task, also while others run."""
        heapq.heappush(self._heap, (urgency, self._added, task))
        self._added += 1

    def pop(self) -> Task:
        """Take out the most urgent task."""
        return heapq.heappop(self._heap)[2]

    def __len__(self) -> int:
        return len(self._heap)


@lru_cache
def _open(model: str, device: str) -> ReferenceBackend:
    return open_backend(Job(model, None, False, device, 1))


@lru_cache
def _cells(num_layers: int) -> dict[str, Cell]:
    return {c.name: c for s in settings(num_layers) for c in s.cells.values()}


def measure_task(device: str, task: Task) -> list[dict[str, Any]]:
    """One record per cell; a cell that cannot run gives a record with the reason."""
    backend = _open(task.model, device)
    todo = [_cells(backend.num_layers)[name] for name in task.names]
    caches = Caches(backend, task.example, todo)
    return [{"part": task.part} | _measured(caches, cell) for cell in todo]


def _measured(caches: Caches, cell: Cell) -> dict[str, Any]:
    try:
        return measure_cell(caches, cell)
    except CacheSlideError as refused:
        about = {"id": record_id(cell.name, caches.example), "cell": cell.name, "example": prompt_id(caches.example)}
        return about | {"failure": str(refused)}


def results(waiting: Waiting, device: str, jobs: int, until: float) -> Iterator[tuple[Task, Sequence[dict[str, Any]]]]:
    """Every task with its records, in `jobs` processes (0: in this one); none begins after the time `until`.

    Tasks may be added to `waiting` between two results.
    """
    if not jobs:
        while waiting and monotonic() < until:
            task = waiting.pop()
            yield task, measure_task(device, task)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        running: dict[Future, Task] = {}
        while running or (waiting and monotonic() < until):
            while waiting and len(running) < jobs + 2 and monotonic() < until:  # two more, so that no process waits
                task = waiting.pop()
                running[pool.submit(measure_task, device, task)] = task
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(done), done.result()
