"""A worker's chunks: an in-memory store that follows the scheduler's index."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cacheslide.core.keys import ChunkKey
from cacheslide.store.base import ChunkKV
from cacheslide.store.memory import MemoryChunkStore
from cacheslide.store.pages import side_by_side
from cacheslide.vllm.worker.host_copies import HostCopies
from cacheslide.vllm.worker.storage import StorageTier


class WorkerStore(MemoryChunkStore):
    """Chunks on `device`; bounded by the scheduler's index, not by itself.

    With `copies` the device is the host beside a GPU. A chunk is then stored as soon as its copy has been issued;
    readers wait for the copy: the host in `get`, streams in `lend`. New chunks are written through to the
    `storage_tier`, if there is one.
    """

    def __init__(
        self, device: torch.device, copies: HostCopies | None = None, storage_tier: StorageTier | None = None
    ) -> None:
        super().__init__()
        self.device, self.copies, self.storage_tier = device, copies, storage_tier
        self._arriving: dict[ChunkKey, torch.cuda.Event] = {}
        self.awaiting: set[ChunkKey] = set()  # chunks to be written through once they have scores

    def put(self, key: ChunkKey, chunk: ChunkKV) -> None:
        """See `ChunkStore.put`. The chunk's tensors must not be modified afterwards."""
        if self.contains(key):
            super().put(key, chunk)
            return
        if self.storage_tier is not None:
            self.storage_tier.release([key])  # replaced by this version
        tensors = [chunk.k, chunk.v, *chunk.layer_inputs.values()]
        if self.copies is None:
            k, v, *inputs = (t.to(self.device) for t in tensors)
        else:
            (k, v, *inputs), self._arriving[key] = self.copies.send(tensors)
        self._hold(key, chunk, k, v, inputs)
        if key not in self.awaiting:
            self._write(key)

    def _write(self, key: ChunkKey) -> None:
        """Write a chunk through."""
        if self.storage_tier is not None:
            self.storage_tier.write(key, self._chunks[key], self._arriving.get(key))

    def await_no_more(self, keys: Iterable[ChunkKey]) -> None:
        """Write through chunks that waited for scores, with the scores they have."""
        for key in self.awaiting.intersection(keys):
            self.awaiting.discard(key)
            if key in self._chunks:
                self._write(key)

    def put_loaded(self, key: ChunkKey, chunk: ChunkKV) -> None:
        """`put` of a chunk read from the storage tier, in the host memory that `StorageTier` was configured with."""
        if not self.contains(key):
            both = side_by_side(chunk.k, chunk.v)
            pair = (chunk.k, chunk.v) if both is None else (both,)
            # From pinned memory to a GPU this does not wait for queued work.
            tensors = [t.to(self.device, non_blocking=True) for t in (*pair, *chunk.layer_inputs.values())]
            k, v = tensors[:2] if both is None else tensors[0].unbind(2)
            self._hold(key, chunk, k, v, tensors[len(pair) :])

    def _hold(self, key: ChunkKey, chunk: ChunkKV, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> None:
        positions = chunk.positions.cpu()  # read only by the host
        layer_inputs = dict(zip(chunk.layer_inputs, inputs, strict=True))
        super().put(key, replace(chunk, k=k, v=v, positions=positions, layer_inputs=layer_inputs))

    def get(self, key: ChunkKey) -> ChunkKV | None:
        """See `ChunkStore.get`; readable by the host."""
        return self.lend(key, ())

    def lend(self, key: ChunkKey, streams: "Sequence[torch.cuda.Stream]") -> ChunkKV | None:
        """The chunk, for work issued to `streams` from now on; without streams, for the host."""
        if (done := self._arriving.get(key)) is not None:
            if done.query():
                del self._arriving[key]
            elif streams:
                for stream in streams:
                    stream.wait_event(done)
            else:
                done.synchronize()
        return super().get(key)

    def first_position(self, key: ChunkKey) -> int:
        """First position of a stored chunk; does not wait for its KV."""
        return int(self._chunks[key].positions[0])

    def settle(self) -> None:
        """Free device memory of finished copies."""
        if self.copies is not None:
            self.copies.settle()

    def drop(self, keys) -> None:
        """Drop `keys`; missing ones are ignored."""
        for key in keys:
            self.await_no_more([key])
            self._arriving.pop(key, None)  # pinned memory is freed only after the copies into it
            if (chunk := self._chunks.pop(key, None)) is not None:
                self._bytes -= chunk.nbytes
                self.stats.evictions += 1

    def evict(self, keys: Iterable[ChunkKey]) -> None:
        """Drop `keys` to make room; corrected chunks stored nowhere else go to the storage tier."""
        for key in keys:
            chunk = self._chunks.get(key)
            if chunk is not None and self.storage_tier is not None:
                self.storage_tier.spill(key, chunk, self._arriving.get(key))
            self.drop([key])

    def release(self, keys: Iterable[ChunkKey]) -> None:
        """Drop the corrected chunks among `keys` in all tiers, unwritten; exact ones stay."""
        keys = list(keys)
        self.drop([key for key in keys if key in self._chunks and self._chunks[key].generation])
        if self.storage_tier is not None:
            self.storage_tier.release(keys)

    def hand_over(self, to: "WorkerStore") -> None:
        """Move every chunk to another store."""
        to.awaiting, self.awaiting = self.awaiting, set()
        for key in list(self._chunks):
            to.put(key, self.get(key))
            self.drop([key])

    def clear(self) -> None:
        """Drop everything; chunks that wait for scores are not written."""
        self.awaiting.clear()
        self.drop(list(self._chunks))

    def close(self) -> None:
        """Drop everything, after all copies have finished."""
        if self.copies is not None:
            self.copies.finish()
        self.clear()
