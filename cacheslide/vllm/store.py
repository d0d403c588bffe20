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
        new = not self.contains(key)
        moved = self._moved(chunk)
        if self.pinned:
            moved = replace(moved, k=moved.k.pin_memory(), v=moved.v.pin_memory())
        super().put(key, moved)
        if new and self.below is not None:
            self.below.write(key, moved)

    def land(self, key: ChunkKey, chunk: ChunkKV) -> None:
        """`put` of a chunk that came from below, in the kind of memory that `Below` was asked for."""
        super().put(key, self._moved(chunk))

    def _moved(self, chunk: ChunkKV) -> ChunkKV:
        """On this store's device; positions are read by the host alone."""
        k, v = chunk.k.to(self.device), chunk.v.to(self.device)
        inputs = {layer: x.to(self.device) for layer, x in chunk.layer_inputs.items()}
        return replace(chunk, k=k, v=v, positions=chunk.positions.cpu(), layer_inputs=inputs)

    def drop(self, keys) -> None:
        """Forget `keys`; those that are not here are none of its business."""
        for key in keys:
            if (chunk := self._chunks.pop(key, None)) is not None:
                self._bytes -= chunk.nbytes
                self.stats.evictions += 1

    def hand_over(self, to: "WorkerStore") -> None:
        """Give every chunk to another store and forget it."""
        for key, chunk in list(self._chunks.items()):
            to.put(key, chunk)
            self.drop([key])

    def clear(self) -> None:
        """Forget everything."""
        self.drop(list(self._chunks))
