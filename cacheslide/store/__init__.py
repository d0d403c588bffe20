"""Chunk stores: computed KV for reuse. One interface, several tiers."""

from cacheslide.store.base import ChunkKV, ChunkStore
from cacheslide.store.config import StoreConfig, open_store
from cacheslide.store.directory import DirectoryChunkStore
from cacheslide.store.memory import MemoryChunkStore
from cacheslide.store.slide.tiered import TieredChunkStore

__all__ = [
    "ChunkKV",
    "ChunkStore",
    "DirectoryChunkStore",
    "MemoryChunkStore",
    "StoreConfig",
    "TieredChunkStore",
    "open_store",
]
