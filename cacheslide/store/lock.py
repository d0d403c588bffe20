"""One writer a shard: an flock that the kernel takes back when its holder dies, and a note of who holds it."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path

from cacheslide.errors import StoreError
from cacheslide.store.files import Files


class StoreBusy(StoreError):
    """Another process kept a shard's lock longer than the limit."""


class WriterLock:
    """A lock between processes and threads.

    A holder that dies, by kill -9 too, loses the lock with its file descriptor. Its note stays behind in the file:
    `acquire` returns True when it finds one, and the caller then cleans up what the dead writer left half done.
    Waiting is limited by a monotonic clock.
    """

    def __init__(self, path: Path, files: Files, timeout_s: float) -> None:
        self.path, self.files, self.timeout_s = path, files, timeout_s
        self._threads = threading.Lock()
        self._fd: int | None = None

    def acquire(self) -> bool:
        """Take the lock; whether the last holder died with it. StoreBusy after the time limit."""
        deadline = time.monotonic() + self.timeout_s
        if not self._threads.acquire(timeout=self.timeout_s):
            raise StoreBusy(f"{self.path}: another thread kept the lock for {self.timeout_s} s")
        fd = None
        try:
            fd = self.files.open(self.path, create=True, write=True)
            pause = 0.0005
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise StoreBusy(
                            f"{self.path}: {self._holder(fd)} kept the lock for {self.timeout_s} s"
                        ) from None
                    time.sleep(pause)
                    pause = min(2 * pause, 0.02)
            stale = os.fstat(fd).st_size > 0
            note = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
            with contextlib.suppress(OSError):  # the note is for people; a full disk must not stop the holder
                self.files.truncate(fd, 0)
                self.files.write(fd, memoryview(note), 0)
            self._fd = fd
            return stale
        except BaseException:
            if fd is not None:
                self.files.close(fd)
            self._threads.release()
            raise

    def release(self) -> None:
        """Give the lock back; an empty file says that nothing was left half done."""
        fd, self._fd = self._fd, None
        try:
            with contextlib.suppress(OSError):
                self.files.truncate(fd, 0)
        finally:
            self.files.close(fd)
            self._threads.release()

    @staticmethod
    def _holder(fd: int) -> str:
        try:
            note = json.loads(os.pread(fd, 200, 0))
            return f"process {note['pid']} on {note['host']}"
        except (ValueError, KeyError, TypeError):
            return "another process"
