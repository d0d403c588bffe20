"""Chunks on their way from the GPU into pinned host memory, behind the back of the step that saves them.

The copies run on a stream of their own. Whoever reads one waits for its event: a stream on the device, or the host.
"""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from cacheslide.units import GIB
from cacheslide.vllm.worker.pinned import PinnedMemory

UNDER_WAY = GIB  # bytes of device memory whose copies are under way at most; later saves wait on the device


class HostCopies:
    """Copies tensors of a GPU into pinned memory without making the host wait.

    Parameters
    ----------
    device : torch.device
    under_way : int
        Bytes of device memory that copies may hold. Beyond it the stream that saves waits for the oldest copy, since
        the next step's forward needs that memory.
    memory : PinnedMemory, optional
        Where the copies lie; without it torch pins memory for each.
    """

    def __init__(self, device: torch.device, under_way: int = UNDER_WAY, memory: PinnedMemory | None = None) -> None:
        self.device, self.under_way, self.held = torch.device(device), under_way, 0
        self.memory = memory or PinnedMemory(None, tuple)
        self.stream = torch.cuda.Stream(self.device)
        self._sources: deque[tuple[torch.cuda.Event, list[Tensor], int]] = deque()

    def send(self, tensors: Sequence[Tensor]) -> "tuple[list[Tensor], torch.cuda.Event]":
        """Pinned tensors that hold what `tensors` hold now, once the event has happened."""
        tensors = list(tensors)
        nbytes = sum(t.numel() * t.element_size() for t in tensors)
        current = torch.cuda.current_stream(self.device)
        self._make_room(nbytes, current)
        self.memory.settle()  # what was evicted for these makes room for them
        held = [self.memory.for_stream(t.shape, t.dtype, self.stream) for t in tensors]
        self.stream.wait_stream(current)
        done = torch.cuda.Event()
        with torch.cuda.stream(self.stream):
            for to, source in zip(held, tensors, strict=True):
                to.copy_(source, non_blocking=True)
            done.record(self.stream)
        self._sources.append((done, tensors, nbytes))
        self.held += nbytes
        return held, done

    def finish(self) -> None:
        """Have the host wait for all copies, and let go of their sources."""
        self.stream.synchronize()
        self._sources.clear()
        self.held = 0

    def settle(self) -> None:
        """Let go of what has been copied."""
        while self._sources and self._sources[0][0].query():
            self._let_go()

    def _let_go(self) -> "torch.cuda.Event":
        done, _, size = self._sources.popleft()
        self.held -= size
        return done

    def _make_room(self, nbytes: int, current: "torch.cuda.Stream") -> None:
        """What is let go before it has been copied is written to only by work behind `current`'s wait."""
        self.settle()
        while self._sources and self.held + nbytes > self.under_way:
            current.wait_event(self._let_go())
