"""Asynchronous write-back: a queue bounded in bytes that blocks its producers."""

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol


class Job(Protocol):
    """A write. `nbytes` counts against the queue's limit until it is done."""

    nbytes: int


class WriteBack:
    """Runs `write` on batches of jobs in its own threads.

    Parameters
    ----------
    write : callable
        Takes a list of jobs; must handle its own failures.
    limit : int
        Maximum bytes of jobs queued or being written. A larger job is accepted when nothing else is queued.
    batch : int
        Bytes given to `write` at a time, unless one job has more.
    stall_limit_s : float
        Longest wait for room; then `reserve` fails, so that a dead disk cannot block a request.
    """

    def __init__(
        self, write: Callable[[Sequence[Job]], None], limit: int, batch: int, stall_limit_s: float, workers: int = 1
    ) -> None:
        self._write, self.limit, self.batch, self.stall_limit_s = write, limit, batch, stall_limit_s
        self._changed = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._taken = self._running = 0
        self._closed = False
        self.stall_s, self.stalls, self.peak = 0.0, 0, 0
        self.errors: deque[str] = deque(maxlen=16)
        name = "cacheslide-write"
        self._threads = [threading.Thread(target=self._work, daemon=True, name=name) for _ in range(workers)]
        for t in self._threads:
            t.start()
        atexit.register(self.close)  # a thread killed while writing would crash the interpreter

    def reserve(self, nbytes: int) -> bool:
        """Wait for room for `nbytes`; False after the time limit or if the queue is closed."""
        start = time.monotonic()
        with self._changed:
            fits = self._changed.wait_for(
                lambda: self._closed or self._taken == 0 or self._taken + nbytes <= self.limit, self.stall_limit_s
            )
            waited = time.monotonic() - start
            if waited > 1e-4:
                self.stalls += 1
                self.stall_s += waited
            if not fits or self._closed:
                return False
            self._taken += nbytes
            self.peak = max(self.peak, self._taken)
            return True

    def release(self, nbytes: int) -> None:
        """Give back reserved bytes that are not needed."""
        with self._changed:
            self._taken -= nbytes
            self._changed.notify_all()

    def submit(self, job: Job) -> None:
        """Queue a job whose bytes were reserved."""
        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until everything submitted so far is written; False if `timeout_s` was too short."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._running, timeout_s)

    def close(self, timeout_s: float = 30.0) -> bool:
        """Write what is queued, then stop; False if `timeout_s` was too short."""
        atexit.unregister(self.close)
        done = self.flush(timeout_s)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for t in self._threads:
            t.join(0.1 if not done else timeout_s)
        return done

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                jobs, size = [self._jobs.popleft()], 0
                size = jobs[0].nbytes
                while self._jobs and size + self._jobs[0].nbytes <= self.batch:
                    jobs.append(self._jobs.popleft())
                    size += jobs[-1].nbytes
                self._running += 1
            try:
                self._write(jobs)
            except Exception as error:  # the thread must go on: unwritten jobs are lost, and logged
                self.errors.append(f"{type(error).__name__}: {error}")
            finally:
                with self._changed:
                    self._running -= 1
                    self._taken -= size
                    self._changed.notify_all()
