"""Copies of chunks from the GPU into pinned host memory, asynchronous to the step that saves them.

The copies run on a stream of their own. Readers wait for a copy's event, on the host or on their stream.
"""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from cacheslide.units import GIB
from cacheslide.vllm.worker.pinned import PinnedMemory

UNDER_WAY = GIB  # maximum device bytes of unfinished copies; later saves wait on the device


class HostCopies:
    """Copies GPU tensors into pinned memory without blocking the host.

    Parameters
    ----------
    device : torch.device
    under_way : int
        Maximum device bytes held by copies. Beyond it the saving stream waits for the oldest copy, since the next
        step's forward needs that memory.
    memory : PinnedMemory, optional
        Destination of the copies; without it torch pins memory for each.
    """

    def __init__(self, device: torch.device, under_way: int = UNDER_WAY, memory: PinnedMemory | None = None) -> None:
        self.device, self.under_way, self.held = torch.device(device), under_way, 0
        self.memory = memory or PinnedMemory(None, tuple)
        self.stream = torch.cuda.Stream(self.device)
        self._sources: deque[tuple[torch.cuda.Event, list[Tensor], int]] = deque()

    def send(self, tensors: Sequence[Tensor]) -> "tuple[list[Tensor], torch.cuda.Event]":
        """Pinned copies of `tensors`, valid once the returned event has happened."""
        tensors = list(tensors)
        nbytes = sum(t.numel() * t.element_size() for t in tensors)
        current = torch.cuda.current_stream(self.device)
        self._make_room(nbytes, current)
        self.memory.settle()  # evicted chunks make room for these
        copies = [self.memory.for_stream(t.shape, t.dtype, self.stream) for t in tensors]
        self.stream.wait_stream(current)
        done = torch.cuda.Event()
        with torch.cuda.stream(self.stream):
            for to, source in zip(copies, tensors, strict=True):
                to.copy_(source, non_blocking=True)
            done.record(self.stream)
        self._sources.append((done, tensors, nbytes))
        self.held += nbytes
        return copies, done

    def finish(self) -> None:
        """Wait on the host for all copies, and release their sources."""
        self.stream.synchronize()
        self._sources.clear()
        self.held = 0

    def settle(self) -> None:
        """Release the sources of finished copies."""
        while self._sources and self._sources[0][0].query():
            self._let_go()

    def _let_go(self) -> "torch.cuda.Event":
        done, _, size = self._sources.popleft()
        self.held -= size
        return done

    def _make_room(self, nbytes: int, current: "torch.cuda.Stream") -> None:
        """Release the oldest sources until `nbytes` fit; the stream `current` waits for their copies."""
        self.settle()
        while self._sources and self.held + nbytes > self.under_way:
            current.wait_event(self._let_go())
