"""Layer-wise prefetch: cached rows are copied from pinned host memory to the GPU a few layers ahead of their use.

The copies run on a stream of their own, so layer l is computed while later layers arrive (the paper's load-compute
overlap, section 4.4). Layers are copied in groups, since every copy costs the host tens of microseconds at any size; a
ring of groups bounds the memory.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cacheslide.core.placement import Piece
from cacheslide.store.base import ChunkKV
from cacheslide.store.pages import side_by_side

GROUP, DEPTH = 4, 2  # layers per group, groups in flight
_ALIGNED = 256  # bytes
Parts = list[tuple[Tensor, Tensor]]


class Rings:
    """Device memory for copies in flight, reused between runs, so that a prefetch never waits for an allocator.

    A run takes memory piece by piece and returns all of it with `run_over`; the next run's copies wait for work issued
    before that, and not for vLLM's later work.
    """

    def __init__(self, device: torch.device, stream: "torch.cuda.Stream | None" = None) -> None:
        self.device, self.stream = torch.device(device), stream
        self.memory, self.used = torch.empty(0, dtype=torch.uint8), 0

    def reserve(self, nbytes: int) -> None:
        """Reserve `nbytes` for a run."""
        if nbytes > len(self.memory):
            if self.stream is not None:  # copies that nothing waited for may still be writing
                torch.cuda.current_stream(self.device).wait_stream(self.stream)
            self.memory = torch.empty(0, dtype=torch.uint8)  # free the old memory before allocating
            self.memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
            self.run_over()  # the allocator may return memory that issued work still uses
        self.used = 0

    def run_over(self) -> None:
        """All work that reads the memory taken has been issued."""
        if self.stream is not None:
            self.idle = torch.cuda.Event()
            self.idle.record(torch.cuda.current_stream(self.device))

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor from the reserved memory, at a multiple of 256 bytes."""
        nbytes = math.prod(shape) * dtype.itemsize
        part = self.memory[self.used : self.used + nbytes]
        if len(part) < nbytes:
            raise LookupError(f"{nbytes} bytes asked for, {len(part)} left of those reserved")
        self.used += -(-nbytes // _ALIGNED) * _ALIGNED
        return part.view(dtype).view(*shape)


def _cut(layers: int, group: int, depth: int) -> tuple[int, int]:
    """Layers per group and groups in flight, for only `layers` layers."""
    size = max(1, min(group, layers))
    return size, max(1, min(depth, -(-layers // size)))


def ring_bytes(pieces: Sequence[Piece], layers: int, group: int = GROUP, depth: int = DEPTH) -> int:
    """Device bytes needed to prefetch `layers` layers of `pieces`."""
    size, depth = _cut(layers, group, depth)
    one = [2 * size * p.chunk.k[0].numel() * p.chunk.k.dtype.itemsize for p in pieces]
    return depth * sum(-(-n // _ALIGNED) * _ALIGNED for n in one)


def _held(chunk: ChunkKV) -> tuple[Tensor, ...]:
    """The tensors to copy: keys and values, or both as one [layers, rows, 2, ...] if they are adjacent."""
    both = side_by_side(chunk.k, chunk.v)
    return (chunk.k, chunk.v) if both is None else (both,)


class LayerFetch:
    """The chunks of `pieces`, fetched group by group.

    Parameters
    ----------
    pieces : sequence of Piece
        Chunks whose K and V are in pinned host memory (in any memory without a stream).
    first, end : int
        Layers [first, end) are requested in order, each any number of times until the next group's turn.
    rings : Rings
        With at least `ring_bytes` reserved. Copies run on its stream; without one they run synchronously.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        first: int,
        end: int,
        rings: Rings,
        group: int = GROUP,
        depth: int = DEPTH,
    ) -> None:
        self.pieces, self.first, self.end = pieces, first, end
        self.device, self.stream = rings.device, rings.stream
        self.size, self.depth = _cut(end - first, group, depth)
        self.held = [_held(p.chunk) for p in pieces]
        self.ring = [self._room(rings) for _ in range(self.depth)]
        self.oldest = self.next = 0  # first group still available, and first group not in flight
        if self.stream is not None:
            self.ready = [torch.cuda.Event() for _ in range(self.depth)]
            self.stream.wait_event(rings.idle)
        for _ in range(self.depth):
            self._issue()

    def _room(self, rings: Rings) -> list[tuple[Tensor, ...]]:
        """For each piece, room for one group's layers of its tensors."""
        rooms = []
        for held in self.held:
            room = rings.take((len(held), self.size, *held[0].shape[1:]), held[0].dtype)
            rooms.append(room.unbind())
        return rooms

    def _layers(self, number: int) -> tuple[int, int]:
        start = self.first + number * self.size
        return start, min(start + self.size, self.end)

    def _issue(self) -> None:
        """Start copying the next group into its place in the ring."""
        start, stop = self._layers(self.next)
        if start >= self.end:
            return
        place = self.next % self.depth
        if self.stream is None:
            self._copy(start, stop, self.ring[place])
        else:
            with torch.cuda.stream(self.stream):
                self._copy(start, stop, self.ring[place])
                self.ready[place].record(self.stream)
        self.next += 1

    def _copy(self, start: int, stop: int, rooms: list[tuple[Tensor, ...]]) -> None:
        for room, held in zip(rooms, self.held, strict=True):
            for to, source in zip(room, held, strict=True):
                to[: stop - start].copy_(source[start:stop], non_blocking=True)  # whole chunks are contiguous memory

    def group(self, layer: int) -> tuple[int, Parts]:
        """The end of the group with `layer`, and keys and values [layers, rows, ...] from `layer` to that end."""
        number = (layer - self.first) // self.size
        if number < self.oldest or layer >= self.end:
            raise LookupError(f"layer {layer} is not under way: groups {self.oldest} to {self.next - 1} are")
        self._retire(number)
        place = number % self.depth
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self.ready[place])
        start, stop = self._layers(number)
        parts = []
        for piece, room in zip(self.pieces, self.ring[place], strict=True):
            k, v = room if len(room) == 2 else room[0].unbind(2)
            parts.append(tuple(x[layer - start : stop - start, piece.rows] for x in (k, v)))
        return stop, parts

    def _retire(self, number: int) -> None:
        """Free groups before `number`, whose uses have been issued, for later groups."""
        if number == self.oldest:
            return
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        for _ in range(number - self.oldest):
            self._issue()
        self.oldest = number
