"""Chunk stores: where computed KV waits to be reused. One interface, several tiers."""

from cacheslide.store.base import ChunkKV, ChunkStore
from cacheslide.store.directory import DirectoryChunkStore
from cacheslide.store.memory import MemoryChunkStore

__all__ = ["ChunkKV", "ChunkStore", "DirectoryChunkStore", "MemoryChunkStore"]
