"""Corrected chunks that left a worker's memory: private pages of its tiered store, which SLIDE's eviction spills.

Corrected KV is never published. Its pages belong to one owner each, the chunk's own key: they wait in the tiered
store's memory, leave it by that store's eviction order into this process's spill file, and are dropped unwritten when
they are released, from the queue too (`cacheslide.store.slide`).
"""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from cacheslide.core.keys import ChunkKey
from cacheslide.store.base import ChunkKV, Fetched
from cacheslide.store.slide.tiered import TieredChunkStore


class SpilledChunks:
    """Which corrected chunks a worker's tiered store has, or will have.

    Parameters
    ----------
    store : TieredChunkStore
    has_memory : bool
        The store's memory is a tier of its own rather than a passage.
    writer : ThreadPoolExecutor
        One thread, in which `take` runs: all that changes the store's private pages comes one after the other.
    """

    def __init__(self, store: TieredChunkStore, has_memory: bool, writer: ThreadPoolExecutor) -> None:
        self.store, self.writer, self.possible = store, writer, has_memory or store.spill is not None
        self.cancelled = 0  # chunks that were given up before they were taken
        self._tickets: dict[ChunkKey, int] = {}
        self._waiting: dict[ChunkKey, tuple[int, ChunkKV, torch.cuda.Event | None]] = {}  # until they are taken
        self._next, self._guard = itertools.count(), threading.Lock()

    def __contains__(self, key: ChunkKey) -> bool:
        return key in self._tickets

    def keys(self) -> list[ChunkKey]:
        """All of them."""
        with self._guard:
            return list(self._tickets)

    def expect(self, key: ChunkKey, chunk: ChunkKV, done: "torch.cuda.Event | None") -> int:
        """A chunk, complete once `done` has happened, is about to be taken; the ticket says which of its versions."""
        with self._guard:
            ticket = self._tickets[key] = next(self._next)
            self._waiting[key] = ticket, chunk, done
            return ticket

    def give_up(self, key: ChunkKey, ticket: int | None = None) -> None:
        """Nobody wants this one any more (with `ticket`: this version): it is not taken, or dropped unwritten."""
        with self._guard:
            if key not in self._tickets or ticket not in (None, self._tickets[key]):
                return
            del self._tickets[key]
            self._waiting.pop(key, None)
        self.writer.submit(self._sweep, key)

    def _sweep(self, key: ChunkKey) -> None:
        if key not in self:  # or `take` sees to what is there of an older version
            self.store.release(key)

    def take(self, key: ChunkKey, ticket: int) -> None:
        """Make a complete chunk's pages private ones of the store, unless it was given up.

        StoreError when they do not fit.
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
        """A chunk that is here; None where it is not, or was lost: an exact one may be in the storage tiers."""
        with self._guard:
            ticket, waiting = self._tickets.get(key), self._waiting.get(key)
        if ticket is None:
            return None
        if waiting is not None:
            _, chunk, done = waiting
            if done is not None:
                done.synchronize()
            return Fetched(chunk, "host")
        found = self.store.fetch(key, key, tokens=tokens)
        if found.chunk is None:
            self.give_up(key, ticket)
            return None
        return found
