"""Layer-wise prefetch: cached rows travel from pinned host memory to the GPU a few layers ahead of their use.

The copies run on a stream of their own, so that layer l computes while layers l + 1, l + 2, ... arrive (the paper's
load-compute overlap, section 4.4). A ring of `depth` layers bounds the memory, whatever the prompt's length.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cacheslide.placement import Piece

DEPTH = 4  # layers under way


class LayerFetch:
    """The rows of `pieces`, one layer after the other.

    Parameters
    ----------
    pieces : sequence of Piece
        Their K and V lie in pinned host memory (any memory without `stream`).
    first, end : int
        Layers [first, end) will be asked for, each once or more, in order.
    device, dtype
        Where they go and what they become.
    stream : torch.cuda.Stream, optional
        Where the copies run; without one they run in place, at once.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        first: int,
        end: int,
        device: torch.device,
        dtype: torch.dtype,
        stream: "torch.cuda.Stream | None" = None,
        depth: int = DEPTH,
    ) -> None:
        self.pieces, self.end, self.stream = pieces, end, stream
        self.depth = max(1, min(depth, end - first))
        rows = sum(p.length for p in pieces)
        heads, dim = pieces[0].chunk.k.shape[2:]
        self.ring = torch.empty(self.depth, 2, rows, heads, dim, dtype=dtype, device=device)
        self.next = first  # the first layer whose copies have not been issued
        if stream is not None:
            self.ready = [torch.cuda.Event() for _ in range(self.depth)]
            stream.wait_stream(torch.cuda.current_stream(device))  # whoever used this memory before is done
            self.ring.record_stream(stream)
        for _ in range(self.depth):
            self._issue()

    def _issue(self) -> None:
        """Start copying the next layer into its place in the ring."""
        layer, self.next = self.next, self.next + 1
        if layer >= self.end:
            return
        place = self.ring[layer % self.depth]
        if self.stream is None:
            self._copy(layer, place)
            return
        with torch.cuda.stream(self.stream):
            self._copy(layer, place)
            self.ready[layer % self.depth].record(self.stream)

    def _copy(self, layer: int, place: Tensor) -> None:
        at = 0
        for piece in self.pieces:
            to = slice(at, at + piece.length)
            place[0, to].copy_(piece.chunk.k[layer, : piece.length], non_blocking=True)
            place[1, to].copy_(piece.chunk.v[layer, : piece.length], non_blocking=True)
            at += piece.length

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, kv_heads, head_dim] as cached; good until `release(layer)`."""
        if not self.next - self.depth <= layer < self.next:
            raise LookupError(f"layer {layer} is not under way: {self.next - self.depth}..{self.next - 1} are")
        if self.stream is not None:
            torch.cuda.current_stream(self.ring.device).wait_event(self.ready[layer % self.depth])
        k, v = self.ring[layer % self.depth]
        return k, v

    def release(self, layer: int) -> None:
        """The layers up to `layer` have been used, by work already issued; later ones take their places."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.ring.device))
        while self.next <= layer + self.depth and self.next < self.end:
            self._issue()
