"""Layer-wise prefetch: cached rows travel from pinned host memory to the GPU a few layers ahead of their use.

The copies run on a stream of their own, so that layer l computes while later layers arrive (the paper's load-compute
overlap, section 4.4). Layers travel in groups, since every copy costs the host tens of microseconds whatever its size;
a ring of groups bounds the memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cacheslide.placement import Piece

GROUP, DEPTH = 4, 2  # layers of a group, groups under way
Parts = list[tuple[Tensor, Tensor]]


class LayerFetch:
    """The chunks of `pieces`, group after group.

    Parameters
    ----------
    pieces : sequence of Piece
        Their chunks' K and V lie in pinned host memory (any memory without `stream`).
    first, end : int
        Layers [first, end) will be asked for in order, each as often as wanted until the next group's turn.
    device : torch.device
    stream : torch.cuda.Stream, optional
        Where the copies run; without one they run in place, at once.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        first: int,
        end: int,
        device: torch.device,
        stream: "torch.cuda.Stream | None" = None,
        group: int = GROUP,
        depth: int = DEPTH,
    ) -> None:
        self.pieces, self.first, self.end, self.stream, self.device = pieces, first, end, stream, device
        self.size = max(1, min(group, end - first))
        self.depth = max(1, min(depth, -(-(end - first) // self.size)))
        self.ring = [self._room() for _ in range(self.depth)]
        self.oldest = self.next = 0  # groups that may still be asked for, and the first that is not under way
        if stream is not None:
            self.ready = [torch.cuda.Event() for _ in range(self.depth)]
            stream.wait_stream(torch.cuda.current_stream(device))  # whoever used this memory before is done
        for _ in range(self.depth):
            self._issue()

    def _room(self) -> Parts:
        """Per piece, room for the keys and values [layers of a group, rows, kv_heads, head_dim] of its chunk."""
        parts = []
        for piece in self.pieces:
            shape = (2, self.size, *piece.chunk.k.shape[1:])
            both = torch.empty(shape, dtype=piece.chunk.k.dtype, device=self.device)
            if self.stream is not None:
                both.record_stream(self.stream)
            parts.append((both[0], both[1]))
        return parts

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

    def _copy(self, start: int, stop: int, room: Parts) -> None:
        for piece, pair in zip(self.pieces, room, strict=True):
            for to, held in zip(pair, (piece.chunk.k, piece.chunk.v), strict=True):
                to[: stop - start].copy_(held[start:stop], non_blocking=True)  # whole chunks: one block of memory

    def group(self, layer: int) -> tuple[int, Parts]:
        """The end of the group that holds `layer`, and from `layer` on its keys and values [layers, rows, ...]."""
        number = (layer - self.first) // self.size
        if number < self.oldest or layer >= self.end:
            raise LookupError(f"layer {layer} is not under way: groups {self.oldest} to {self.next - 1} are")
        self._retire(number)
        place = number % self.depth
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self.ready[place])
        start, stop = self._layers(number)
        within = slice(layer - start, stop - start)
        parts = [
            (k[within, p.rows], v[within, p.rows]) for p, (k, v) in zip(self.pieces, self.ring[place], strict=True)
        ]
        return stop, parts

    def _retire(self, number: int) -> None:
        """Groups before `number` have been used, by work already issued: later ones take their places."""
        if number == self.oldest:
            return
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        for _ in range(number - self.oldest):
            self._issue()
        self.oldest = number
