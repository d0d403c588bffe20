"""A worker's chunks: an in-memory store that keeps and drops what the scheduler's index says."""

from dataclasses import replace

import torch

from cacheslide.keys import ChunkKey
from cacheslide.store.base import ChunkKV
from cacheslide.store.memory import MemoryChunkStore
from cacheslide.vllm.below import Below


class WorkerStore(MemoryChunkStore):
    """Chunks on `device`, in pinned memory when that is the host beside a GPU. The index bounds it, not itself.

    New chunks are written through to the tiers `below`, if there are any.
    """

    def __init__(self, device: torch.device, pinned: bool, below: Below | None = None) -> None:
        super().__init__()
        self.device, self.pinned, self.below = device, pinned, below

    def put(self, key: ChunkKey, chunk: ChunkKV) -> None:
        """See `ChunkStore.put`."""
        new = key not in self._chunks
        self.land(key, chunk)
        if new and self.below is not None:
            self.below.write(key, self._chunks[key])

    def land(self, key: ChunkKey, chunk: ChunkKV) -> None:
        """`put` of a chunk that came from below."""
        moved = {name: getattr(chunk, name).to(self.device) for name in ("k", "v")}
        moved["positions"] = chunk.positions.cpu()  # read by the host alone
        moved["layer_inputs"] = {layer: x.to(self.device) for layer, x in chunk.layer_inputs.items()}
        if self.pinned:
            # Rows of one chunk together, keys apart from values: what a prefetch copies in one go.
            moved = moved | {name: _pinned(moved[name]) for name in ("k", "v")}
        super().put(key, replace(chunk, **moved))

    def drop(self, keys) -> None:
        """Forget `keys`; those that are not here are none of its business."""
        for key in keys:
            if (chunk := self._chunks.pop(key, None)) is not None:
                self._bytes -= chunk.nbytes
                self.stats.evictions += 1

    def hand_over(self, to: "WorkerStore") -> None:
        """Give every chunk to another store and forget it."""
        for key, chunk in list(self._chunks.items()):
            to.land(key, chunk)
            self.drop([key])

    def clear(self) -> None:
        """Forget everything."""
        self.drop(list(self._chunks))


def _pinned(x: torch.Tensor) -> torch.Tensor:
    return x if x.is_pinned() and x.is_contiguous() else x.contiguous().pin_memory()
