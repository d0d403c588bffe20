"""A worker's chunks: an in-memory store that keeps and drops what the scheduler's index says."""

from dataclasses import replace

import torch

from cacheslide.keys import ChunkKey
from cacheslide.store.base import ChunkKV
from cacheslide.store.memory import MemoryChunkStore


class WorkerStore(MemoryChunkStore):
    """Chunks on `device`, in pinned memory when that is the host beside a GPU. The index bounds it, not itself."""

    def __init__(self, device: torch.device, pinned: bool) -> None:
        super().__init__()
        self.device, self.pinned = device, pinned

    def put(self, key: ChunkKey, chunk: ChunkKV) -> None:
        """See `ChunkStore.put`."""
        moved = {name: getattr(chunk, name).to(self.device) for name in ("k", "v")}
        moved["positions"] = chunk.positions.cpu()  # read by the host alone
        moved["layer_inputs"] = {layer: x.to(self.device) for layer, x in chunk.layer_inputs.items()}
        if self.pinned:
            moved = moved | {name: moved[name].pin_memory() for name in ("k", "v")}
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
            to.put(key, chunk)
            self.drop([key])

    def clear(self) -> None:
        """Forget everything."""
        self.drop(list(self._chunks))
