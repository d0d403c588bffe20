"""Pinned host memory for chunks, allocated in one piece when the engine starts.

Pinning a gigabyte takes a third of a second, during which no kernel can be launched: pinning chunk by chunk would delay
every turn until all memory is in use. Here chunks take regions of memory pinned before. What does not fit is pinned by
torch's allocator.
"""

import bisect
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import psutil
import torch
from torch import Tensor

from cacheslide.store.files import BLOCK, align, aligned_buffer
from cacheslide.units import GIB

logger = logging.getLogger("vllm.cacheslide")

_THREADS = 8  # that touch fresh pages: the kernel clears each page on first touch
_PORTABLE = 1  # cudaHostRegisterPortable


class Event(Protocol):
    """The methods of `torch.cuda.Event` used here."""

    def query(self) -> bool:
        """Whether it has happened."""
        ...

    def synchronize(self) -> None:
        """Wait for it on the host."""
        ...


@dataclass
class _Region:
    """Free bytes [start, end); work that reads or writes them is over once `events` have happened."""

    start: int
    end: int
    events: list[Event]


class PinnedMemory:
    """Regions of one pinned piece, taken by any thread and returned by the garbage collector.

    Device work on a region may outlive its tensors, so a returned region is stamped with events on every stream of the
    worker; before those have happened, a new owner must wait for them.

    Parameters
    ----------
    memory : ndarray of uint8, optional
        The piece, from `pin`. None: every region is allocated by torch.
    stamp : callable
        Records an event on every stream that works on regions; called by `settle`, in the thread that issues their
        work.
    """

    def __init__(self, memory: np.ndarray | None, stamp: Callable[[], Sequence[Event]]) -> None:
        self._memory, self._stamp = memory, stamp
        self._free = [] if memory is None else [_Region(0, len(memory), [])]
        self._returned: deque[tuple[int, int]] = deque()  # appended to during garbage collection: must not lock
        self._guard = threading.Lock()
        self.elsewhere = 0  # regions that did not fit

    def take(self, nbytes: int) -> tuple[Tensor, list[Event]]:
        """uint8 [nbytes] at a block boundary, and the events to wait for before writing to it."""
        with self._guard:
            region = self._fit(align(nbytes))
        if region is None:
            self.elsewhere += self._memory is not None
            return self._apart(nbytes), []
        taken = self._memory[region.start : region.start + nbytes]
        weakref.finalize(taken, self._returned.append, (region.start, region.end)).atexit = False
        return torch.from_numpy(taken), region.events

    def for_host(self, nbytes: int) -> Tensor:
        """A region for the host to write to."""
        out, events = self.take(nbytes)
        for event in events:
            event.synchronize()
        return out

    def for_stream(self, shape: Sequence[int], dtype: torch.dtype, stream: "torch.cuda.Stream") -> Tensor:
        """An uninitialised tensor for work on `stream` to write to."""
        out, events = self.take(torch.Size(shape).numel() * dtype.itemsize)
        for event in events:
            stream.wait_event(event)
        return out.view(dtype).view(*shape)

    def settle(self) -> None:
        """Make returned regions available. Call only from the thread that issues work to the device."""
        if not self._returned:
            return
        events = list(self._stamp())
        with self._guard:
            while self._returned:
                self._give(*self._returned.popleft(), events)

    def _apart(self, nbytes: int) -> Tensor:
        """Pinned memory from torch."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def _fit(self, size: int) -> _Region | None:
        """Take `size` bytes from the smallest free region that is large enough."""
        fitting = [r for r in self._free if r.end - r.start >= size]
        if not fitting:
            return None
        region = min(fitting, key=lambda r: r.end - r.start)
        region.events = [e for e in region.events if not e.query()]
        taken = _Region(region.start, region.start + size, list(region.events))
        region.start += size
        if region.start == region.end:
            self._free.remove(region)
        return taken

    def _give(self, start: int, end: int, events: list[Event]) -> None:
        """Return a region, merged with its neighbours."""
        at = bisect.bisect(self._free, start, key=lambda r: r.start)
        region = _Region(start, end, list(events))
        if at < len(self._free) and self._free[at].start == end:
            self._join(region, self._free.pop(at))
        if at and self._free[at - 1].end == start:
            self._join(self._free[at - 1], region)
        else:
            self._free.insert(at, region)

    @staticmethod
    def _join(left: _Region, right: _Region) -> None:
        left.end = right.end
        left.events += [e for e in right.events if e not in left.events]
        left.events = [e for e in left.events if not e.query()]


def pin(nbytes: int) -> np.ndarray | None:
    """uint8 [nbytes] of pinned memory, in whole blocks; None, with a warning, if the host lacks the memory.

    It is unpinned when the array and all its slices are deleted.
    """
    nbytes = nbytes // BLOCK * BLOCK
    if not nbytes:
        return None
    if nbytes > (free := psutil.virtual_memory().available):
        logger.warning("CacheSlide pins memory as chunks come: %.1f of %.1f GiB are free", free / GIB, nbytes / GIB)
        return None
    memory = np.frombuffer(aligned_buffer(nbytes), dtype=np.uint8)
    cut = align(-(-nbytes // _THREADS))
    with ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(lambda first: memory[first : first + cut : BLOCK].fill(0), range(0, nbytes, cut)))
    cudart = torch.cuda.cudart()
    error = cudart.cudaHostRegister(memory.ctypes.data, nbytes, _PORTABLE)
    if int(error):
        logger.warning("CacheSlide pins memory as chunks come: CUDA does not pin %.1f GiB (%s)", nbytes / GIB, error)
        return None
    weakref.finalize(memory, cudart.cudaHostUnregister, memory.ctypes.data).atexit = False
    return memory
