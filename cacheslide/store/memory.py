"""A bounded in-memory store with least-recently-used eviction."""

from collections import OrderedDict
from dataclasses import replace

from torch import Tensor

from cacheslide.core.keys import ChunkKey
from cacheslide.errors import StoreError
from cacheslide.store.base import ChunkKV, ChunkStore


class MemoryChunkStore(ChunkStore):
    """Holds at most `capacity` bytes (None: no limit); evicts the least recently used chunks first."""

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__()
        if capacity is not None and capacity < 0:
            raise StoreError(f"capacity must be at least 0 bytes, not {capacity}")
        self.capacity = capacity
        self._chunks: OrderedDict[ChunkKey, ChunkKV] = OrderedDict()
        self._bytes = 0

    def contains(self, key: ChunkKey) -> bool:
        return key in self._chunks

    def get(self, key: ChunkKey) -> ChunkKV | None:
        chunk = self._chunks.get(key)
        if chunk is None:
            self.stats.misses += 1
            return None
        self._chunks.move_to_end(key)
        self.stats.hits += 1
        self.stats.bytes_read += chunk.nbytes
        return chunk

    def put(self, key: ChunkKey, chunk: ChunkKV) -> None:
        if key in self._chunks:
            self._chunks.move_to_end(key)
            return
        if self.capacity is not None:
            if chunk.nbytes > self.capacity:
                raise StoreError(f"a chunk of {chunk.nbytes} bytes cannot fit a store of {self.capacity} bytes")
            while self._bytes + chunk.nbytes > self.capacity:
                _, old = self._chunks.popitem(last=False)
                self._bytes -= old.nbytes
                self.stats.evictions += 1
        self._chunks[key] = chunk
        self._bytes += chunk.nbytes
        self.stats.puts += 1
        self.stats.bytes_written += chunk.nbytes

    def rescore(self, key: ChunkKey, scores: Tensor, of: ChunkKV | None = None) -> bool:
        stored = self._chunks.get(key)
        if stored is None or (of is not None and of.k is not stored.k):
            return False
        return self._swap(key, replace(stored, scores=scores))

    def replace(self, key: ChunkKey, chunk: ChunkKV) -> bool:
        return key in self._chunks and self._swap(key, chunk)

    def _swap(self, key: ChunkKey, chunk: ChunkKV) -> bool:
        if self.capacity is not None and chunk.nbytes > self.capacity:
            return False
        self._bytes -= self._chunks.pop(key).nbytes
        MemoryChunkStore.put(self, key, chunk)  # stored in place: a subclass's `put` may move the chunk
        return True

    def __len__(self) -> int:
        return len(self._chunks)

    @property
    def nbytes(self) -> int:
        return self._bytes
