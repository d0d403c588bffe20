"""One writer per shard: an flock, which the kernel releases when its holder dies, and a note naming the holder."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time

from cacheslide.errors import StoreError
from cacheslide.store.folder import Folder
from cacheslide.store.strict import is_count, parse_object

_NOTE_BYTES = 512


class StoreBusy(StoreError):
    """Another process held a shard's lock longer than the time limit."""


class WriterLock:
    """A lock between processes and threads.

    A holder that dies, also by kill -9, loses the lock with its file descriptor, but its note stays in the file.
    `acquire` then returns True, and the caller cleans up the dead writer's incomplete work. Waiting is limited by a
    monotonic clock. Content that is not such a note is left unchanged.
    """

    def __init__(self, folder: Folder, timeout_s: float) -> None:
        self.folder, self.files, self.timeout_s = folder, folder.files, timeout_s
        self.path = folder.path / "lock"
        self._threads = threading.Lock()
        self._fd: int | None = None
        self._noted = True

    def acquire(self, limit_s: float | None = None) -> bool:
        """Take the lock; returns whether its last holder died with it. StoreBusy after the time limit, or `limit_s`."""
        limit_s = self.timeout_s if limit_s is None else limit_s
        deadline = time.monotonic() + limit_s
        if not self._threads.acquire(timeout=limit_s):
            raise StoreBusy(f"{self.path}: another thread kept the lock for {limit_s} s")
        fd = None
        try:
            fd = self.folder.open("lock", create=True, write=True)
            pause = 0.0005
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise StoreBusy(f"{self.path}: {self._holder(fd)} kept the lock for {limit_s} s") from None
                    time.sleep(pause)
                    pause = min(2 * pause, 0.02)
            last_note = _note(fd)
            self._fd, self._noted = fd, last_note is not None
            if last_note is None:
                return False
            note = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
            with contextlib.suppress(OSError):  # the note is informative; a full disk must not stop the holder
                self.files.truncate(fd, 0)
                self.files.write(fd, memoryview(note), 0)
            return bool(last_note)
        except BaseException:
            if fd is not None:
                self.files.close(fd)
            self._threads.release()
            raise

    def release(self) -> None:
        """Release the lock; the file is emptied to show that nothing is incomplete."""
        fd, self._fd = self._fd, None
        try:
            if self._noted:
                with contextlib.suppress(OSError):
                    self.files.truncate(fd, 0)
        finally:
            self.files.close(fd)
            self._threads.release()

    @staticmethod
    def _holder(fd: int) -> str:
        note = _note(fd)
        return f"process {note['pid']} on {note['host']}" if note else "another process"


def _note(fd: int) -> dict | None:
    """The last holder's note, empty if it left none; None if the file holds something else."""
    raw = os.pread(fd, _NOTE_BYTES, 0)
    if len(raw) == _NOTE_BYTES:
        return None
    if not raw.strip(b"\0"):
        return {}
    if b'{"pid"'.startswith(raw[:6]) and not raw.endswith(b"}"):
        return {"pid": "?", "host": "?"}  # its writer died while writing it
    try:
        note = parse_object(raw, _NOTE_BYTES)
    except ValueError:
        return None
    valid = note.keys() == {"pid", "host"} and is_count(note["pid"]) and isinstance(note["host"], str)
    return note if valid and note["host"].isprintable() else None
