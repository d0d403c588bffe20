"""One store's pages under one lock: its entries, its memory tiers, and pages on their way down."""

import itertools
import threading
from collections.abc import Sequence

from torch import Tensor

from cacheslide.store.pages import PageLayout
from cacheslide.store.persistent.tiers import PersistentTiers, TieredStats
from cacheslide.store.slide.arena import Arena
from cacheslide.store.slide.entry import Entry
from cacheslide.store.slide.eviction import PageId
from cacheslide.store.slide.spill import SpillFile


class PageTable:
    """What the parts of a tiered store share. Every method changes memory only, and none waits.

    Attributes
    ----------
    arenas : list of Arena
        Memory tiers, the fastest first.
    persistent : PersistentTiers
        The tiers where reference chunks outlive memory.
    spill : SpillFile or None
        Where private pages go.
    lock : RLock
        Held by whoever reads or changes what follows.
    places : dict of (name, owner) to Entry
        Known chunks (owner None) and corrected versions of them.
    numbers : dict of int to Entry
        The same by the number that is part of their pages' ids.
    flight : dict of PageId to Tensor
        Pages that left one tier and have not arrived in the next.
    """

    def __init__(
        self, arenas: list[Arena], persistent: PersistentTiers, spill: SpillFile | None, stats: TieredStats
    ) -> None:
        self.arenas, self.persistent, self.spill, self.stats = arenas, persistent, spill, stats
        self.lock = threading.RLock()
        self.places: dict[tuple[bytes, str | None], Entry] = {}
        self.numbers: dict[int, Entry] = {}
        self.flight: dict[PageId, Tensor] = {}
        self._next = itertools.count()

    def entry(
        self,
        name: bytes,
        layout: PageLayout,
        positions: Tensor,
        generation: int,
        owner: str | None = None,
        persisted: bool = False,
        scores: Tensor | None = None,
    ) -> Entry:
        """The entry of a place, made when there is none that can still be completed."""
        with self.lock:
            entry = self.places.get((name, owner))
            if entry is None or entry.lost:
                entry = Entry(next(self._next), name, layout, positions, generation, owner, persisted, scores)
                self.add(entry)
            return entry

    def add(self, entry: Entry) -> None:
        """Know an entry by its place and number."""
        self.places[entry.name, entry.owner] = self.numbers[entry.number] = entry

    def mark(self, entry: Entry) -> None:
        """Tell the tiers a chunk's dirty counts after they changed."""
        for arena in self.arenas:
            for page, number in enumerate(entry.ids(range(entry.layout.pages))):
                if number in arena.held:
                    arena.order.mark(number, entry.dirty(page))

    def drop(self, arena: Arena, numbers: Sequence[PageId], retire: bool = True) -> None:
        """Take pages out of a tier; with `retire`, forget entries of which nothing is left."""
        for n in numbers:
            if n in arena.held:
                arena.drop([n])
                entry = self.numbers[n >> 20]
                entry.holds -= 1
                if retire:
                    self.retire(entry)

    def retire(self, entry: Entry) -> None:
        """Forget a reference entry of which memory holds nothing."""
        if entry.owner is None and not entry.holds and entry.pending is None:
            if self.places.get((entry.name, None)) is entry:
                del self.places[entry.name, None]
            self.numbers.pop(entry.number, None)

    def forget_entry(self, entry: Entry, why: str) -> None:
        """Drop a reference chunk from memory: it cannot be completed any more."""
        entry.lost = why
        self.stats.lost += 1
        ids = entry.ids(range(entry.layout.pages))
        for arena in self.arenas:
            self.drop(arena, ids)
        self.retire(entry)

    def forget_versions(self, entry: Entry, pages: Sequence[int]) -> None:
        """Drop what is kept of private pages: they are replaced or given up. Call with the lock held."""
        ids = entry.ids(pages)
        for arena in self.arenas:
            self.drop(arena, ids)
        for number in ids:
            self.flight.pop(number, None)
        slots = [entry.spilled.pop(p) for p in pages if p in entry.spilled]
        if slots and self.spill is not None:
            self.spill.free(slots)
