"""A process's spill file for corrected pages: page slots on disk.

Corrected pages belong to one request or session of one process and are useless after it, so they are not published:
checksums and slots are kept in memory, and the file's lock shows other processes whether its owner lives. The file of a
dead owner is removed by the next process that needs room. Space is reserved under a lock of the folder, so that all
processes together stay below the capacity.
"""

import contextlib
import fcntl
import os
import re
import threading
import uuid
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import xxhash
from torch import Tensor

from cacheslide.store.files import Files, align, aligned_buffer, tensor_view
from cacheslide.store.folder import Folder, Foreign
from cacheslide.store.lock import WriterLock
from cacheslide.store.persistent.record import Damaged

_STEP = 64 << 20  # bytes reserved at a time
_NAME = re.compile(r"[0-9]{1,10}-[0-9a-f]{32}\.spill")


class SpillFull(OSError):
    """The capacity for corrected pages is exhausted."""


class SpillFile:
    """Page slots on disk. Thread-safe, provided that slots are not read while they are freed.

    Parameters
    ----------
    folder : Path
        Shared by the processes of a store.
    capacity : int
        Maximum bytes of all processes' spill files together.
    page_bytes : int
    shared : bool
        See `Folder`, which raises Foreign for a folder that is not the store's.
    """

    def __init__(
        self,
        folder: Path,
        capacity: int,
        page_bytes: int,
        files: Files,
        *,
        direct: bool = False,
        shared: bool = False,
    ) -> None:
        self.capacity, self.files = capacity, files
        self.page_bytes, self.slot_bytes = page_bytes, align(page_bytes)
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder = Folder(folder, files, shared=shared)
        self.folder.make()
        self.path = folder / f"{os.getpid()}-{uuid.uuid4().hex}.spill"
        self._folder_lock = WriterLock(self.folder, 10.0)
        self._folder_lock.acquire()  # before the file is locked it could be taken for a dead process's
        try:
            self._fd = self.folder.open(self.path.name, new=True, write=True, direct=direct)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            self._folder_lock.release()
        self._guard = threading.Lock()
        self._used = np.zeros(0, dtype=bool)
        self._sums: dict[int, int] = {}
        self.bytes_written = self.extents = self.removed_stale = 0

    def write(self, content: Tensor) -> list[int]:
        """Write pages, uint8 [n, page_bytes], into as few runs of slots as possible; returns their slots.

        SpillFull if the capacity is reached, OSError if the disk fails; nothing is stored then.
        """
        slots = self._allocate(len(content))
        buffer = aligned_buffer(len(content) * self.slot_bytes)
        tensor_view(buffer).view(len(content), self.slot_bytes)[:, : self.page_bytes] = content.cpu()
        try:
            for first, last in runs(slots):
                part = buffer[first * self.slot_bytes : last * self.slot_bytes]
                self.files.write(self._fd, part, slots[first] * self.slot_bytes)
                self.extents += 1
        except BaseException:
            self.free(slots)
            raise
        sums = [xxhash.xxh3_64_intdigest(buffer[i * self.slot_bytes :][: self.page_bytes]) for i in range(len(slots))]
        with self._guard:
            self._sums.update(zip(slots, sums, strict=True))
        self.bytes_written += len(buffer)
        return slots

    def read(self, slots: Sequence[int]) -> Tensor:
        """Pages of `slots`: uint8 [n, page_bytes]; Damaged if one was altered."""
        buffer = aligned_buffer(len(slots) * self.slot_bytes)
        for first, last in runs(slots):
            part = buffer[first * self.slot_bytes : last * self.slot_bytes]
            if self.files.read(self._fd, part, slots[first] * self.slot_bytes) != len(part):
                raise Damaged("the spill file ends before its pages do")
        for i, slot in enumerate(slots):
            if xxhash.xxh3_64_intdigest(buffer[i * self.slot_bytes :][: self.page_bytes]) != self._sums.get(slot):
                raise Damaged(f"slot {slot} of the spill file does not match its checksum")
        return tensor_view(buffer).view(len(slots), self.slot_bytes)[:, : self.page_bytes]

    def free(self, slots: Sequence[int]) -> None:
        """Free slots."""
        with self._guard:
            self._used[list(slots)] = False
            for slot in slots:
                self._sums.pop(slot, None)

    @property
    def nbytes(self) -> int:
        """Bytes of the slots in use."""
        return int(self._used.sum()) * self.slot_bytes

    def close(self) -> None:
        """Remove the file."""
        if self._fd is not None:
            with contextlib.suppress(OSError, Foreign):
                self.folder.unlink(self.path.name)
            self.files.close(self._fd)
            self._fd = None

    def _allocate(self, n: int) -> list[int]:
        """`n` free slots: the first run that is long enough, else the longest runs."""
        with self._guard:
            free = np.flatnonzero(~self._used)
            if len(free) < n:
                self._grow(n - len(free))
                free = np.flatnonzero(~self._used)
            return self._choose(free, n)

    def _choose(self, free: np.ndarray, n: int) -> list[int]:
        cuts = np.flatnonzero(np.diff(free) != 1) + 1
        stretches = np.split(free, cuts)
        fitting = next((r for r in stretches if len(r) >= n), None)
        chosen = fitting if fitting is not None else np.concatenate(sorted(stretches, key=len, reverse=True))
        slots = sorted(int(s) for s in chosen[:n])
        self._used[slots] = True
        return slots

    def _grow(self, slots: int) -> None:
        """Reserve more of the folder's capacity; the file is extended, so that other processes see it."""
        self._folder_lock.acquire()
        try:
            own = len(self._used) * self.slot_bytes
            spare = self.capacity - own - self._others()
            step = max(slots * self.slot_bytes, min(_STEP, spare) // self.slot_bytes * self.slot_bytes)
            if step > spare:
                raise SpillFull(28, f"corrected pages of all processes fill their {self.capacity} bytes")
            self.files.truncate(self._fd, own + step)
            self._used = np.concatenate((self._used, np.zeros(step // self.slot_bytes, dtype=bool)))
        finally:
            self._folder_lock.release()

    def _others(self) -> int:
        """Bytes of other processes' files; files without a living owner are removed."""
        self.removed_stale += stale_spills(self.folder, self.path.name)
        return sum(size for name, size in spills(self.folder).items() if name != self.path.name)


def spills(folder: Folder) -> dict[str, int]:
    """Names and bytes of a folder's spill files; empty if there is no folder."""
    try:
        files = folder.entries(lambda name: _NAME.fullmatch(name) is not None)
    except FileNotFoundError:
        return {}
    return {name: status.st_size for name, status in files.items()}


def stale_spills(folder: Folder, own: str = "") -> int:
    """Remove spill files of dead processes (their locks are free); returns their number."""
    removed = 0
    for name in spills(folder):
        if name == own:
            continue
        with contextlib.suppress(FileNotFoundError, Foreign):
            fd = folder.open(name)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                folder.unlink(name)
                removed += 1
            except BlockingIOError:
                pass
            finally:
                folder.files.close(fd)
    return removed


def runs(slots: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges [first, last) of indices over which `slots` are consecutive."""
    cuts = [0, *(i for i in range(1, len(slots)) if slots[i] != slots[i - 1] + 1), len(slots)]
    return [(a, b) for a, b in pairwise(cuts) if b > a]
