"""Corrected chunks evicted from a worker's memory: private pages of its tiered store, spilled by SLIDE's eviction.

Corrected KV is never published. Its pages have one owner, the chunk's own key: they stay in the tiered store's memory,
are spilled from it in that store's eviction order to this process's spill file, and are dropped unwritten on release,
also from the queue (`cacheslide.store.slide`).
"""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from cacheslide.core.keys import ChunkKey
from cacheslide.store.base import ChunkKV, Fetched
from cacheslide.store.slide.tiered import TieredChunkStore


class SpilledChunks:
    """The corrected chunks that a worker's tiered store has, or is about to have.

    Parameters
    ----------
    store : TieredChunkStore
    has_memory : bool
        The store's memory is a tier of its own, not only a buffer.
    writer : ThreadPoolExecutor
        One thread, which runs `take`: changes of the store's private pages are serialised.
    """

    def __init__(self, store: TieredChunkStore, has_memory: bool, writer: ThreadPoolExecutor) -> None:
        self.store, self.writer, self.possible = store, writer, has_memory or store.spill is not None
        self.cancelled = 0  # chunks released before they were taken
        self._tickets: dict[ChunkKey, int] = {}
        self._waiting: dict[ChunkKey, tuple[int, ChunkKV, torch.cuda.Event | None]] = {}  # until taken
        self._next, self._guard = itertools.count(), threading.Lock()

    def __contains__(self, key: ChunkKey) -> bool:
        return key in self._tickets

    def keys(self) -> list[ChunkKey]:
        """Keys of all of them."""
        with self._guard:
            return list(self._tickets)

    def expect(self, key: ChunkKey, chunk: ChunkKV, done: "torch.cuda.Event | None") -> int:
        """Announce a chunk, complete once `done` has happened; returns a ticket that identifies this version."""
        with self._guard:
            ticket = self._tickets[key] = next(self._next)
            self._waiting[key] = ticket, chunk, done
            return ticket

    def give_up(self, key: ChunkKey, ticket: int | None = None) -> None:
        """Release a chunk (with `ticket`: this version): it is not taken, or dropped unwritten."""
        with self._guard:
            if key not in self._tickets or ticket not in (None, self._tickets[key]):
                return
            del self._tickets[key]
            self._waiting.pop(key, None)
        self.writer.submit(self._sweep, key)

    def _sweep(self, key: ChunkKey) -> None:
        if key not in self:  # otherwise `take` handles the older version
            self.store.release(key)

    def take(self, key: ChunkKey, ticket: int) -> None:
        """Store a complete chunk's pages as private ones, unless it was released.

        StoreError if they do not fit.
        """
        with self._guard:
            number, chunk, _ = self._waiting.get(key, (None, None, None))
        if number != ticket:
            self.cancelled += 1
            return
        try:
            self.store.release(key)
            self.store.put_private(key, key, chunk)
        except BaseException:
            self.give_up(key, ticket)
            raise
        with self._guard:
            if self._tickets.get(key) == ticket:
                del self._waiting[key]

    def fetch(self, key: ChunkKey, tokens: int | None) -> Fetched | None:
        """A corrected chunk; None if absent or lost, when an exact one may be in the storage tiers."""
        with self._guard:
            ticket, waiting = self._tickets.get(key), self._waiting.get(key)
        if ticket is None:
            return None
        if waiting is not None:
            _, chunk, done = waiting
            if done is not None:
                done.synchronize()
            return Fetched(chunk, "host")
        fetched = self.store.fetch(key, key, tokens=tokens)
        if fetched.chunk is None:
            self.give_up(key, ticket)
            return None
        return fetched
