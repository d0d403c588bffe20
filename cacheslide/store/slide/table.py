"""One store's pages under one lock: its entries, its memory tiers, pages on their way down, and what changes them."""

import itertools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cacheslide.store.pages import PageLayout, paged
from cacheslide.store.persistent.tiers import TieredStats
from cacheslide.store.slide.arena import Arena
from cacheslide.store.slide.entry import Entry, Page, empty_pages, split
from cacheslide.store.slide.eviction import PageId
from cacheslide.store.slide.spill import SpillFile


@dataclass
class Gathered:
    """What memory had of some pages at one moment; numbers count within the pages that were asked for.

    Attributes
    ----------
    content : Tensor [n, page_bytes], uint8
        On the first tier's device; what is `missing` is undefined in it.
    tiers : set of str
        Where the others were.
    missing : list of int
    climbing : list of int
        Clean pages of a lower tier.
    slots : dict of int to (int or None)
        Of the missing ones the private pages, and their places in the spill file (None: lost).
    """

    content: Tensor
    tiers: set[str] = field(default_factory=set)
    missing: list[int] = field(default_factory=list)
    climbing: list[int] = field(default_factory=list)
    slots: dict[int, int | None] = field(default_factory=dict)


class PageTable:
    """The state of a store's pages. Thread-safe; every method changes memory only, and none waits for a disk.

    Whoever has to take several steps at once holds `lock`, which every method takes as well.

    Parameters
    ----------
    arenas : list of Arena
        Memory tiers, the fastest first.
    spill : SpillFile or None
        Where private pages go; the table gives their slots back.
    """

    def __init__(self, arenas: list[Arena], spill: SpillFile | None, stats: TieredStats) -> None:
        self.arenas, self.spill, self.stats = arenas, spill, stats
        self.lock = threading.RLock()
        self._places: dict[tuple[bytes, str | None], Entry] = {}
        self._numbers: dict[int, Entry] = {}
        self._owned: dict[str, set[bytes]] = {}
        self._flight: dict[PageId, Tensor] = {}  # pages that left one tier and have not arrived in the next
        self._next = itertools.count()

    # --- entries ---------------------------------------------------------------------------------------------------

    def find(self, name: bytes, owner: str | None = None) -> Entry | None:
        """An owner's version of a chunk, or else its reference version."""
        with self.lock:
            return self._places.get((name, owner)) or self._places.get((name, None))

    def version(self, name: bytes, owner: str | None) -> Entry | None:
        """An owner's version of a chunk alone; the reference version for None."""
        with self.lock:
            return self._places.get((name, owner))

    def page(self, number: PageId) -> Page:
        """The entry and the page number of a page that is held or on its way."""
        entry, page = split(number)
        return self._numbers[entry], page

    def references(self) -> set[bytes]:
        """Names of the chunks that memory knows of."""
        with self.lock:
            return {name for (name, owner), e in self._places.items() if owner is None and not e.lost}

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
            entry = self._places.get((name, owner))
            if entry is None or entry.lost:
                entry = Entry(next(self._next), name, layout, positions, generation, owner, persisted, scores)
                self._add(entry)
            if owner is not None:
                self._owned.setdefault(owner, set()).add(name)
            return entry

    def _add(self, entry: Entry) -> None:
        self._places[entry.name, entry.owner] = self._numbers[entry.number] = entry

    def retire(self, entry: Entry) -> None:
        """Forget a reference entry of which memory holds nothing."""
        with self.lock:
            if entry.owner is None and not entry.holds and entry.pending is None:
                if self._places.get((entry.name, None)) is entry:
                    del self._places[entry.name, None]
                self._numbers.pop(entry.number, None)

    def lose(self, entry: Entry, why: str) -> None:
        """Drop a reference chunk from memory: it cannot be completed any more."""
        with self.lock:
            entry.lost = why
            self.stats.lost += 1
            ids = entry.ids(range(entry.layout.pages))
            for arena in self.arenas:
                self.drop(arena, ids)
            self.retire(entry)

    # --- a chunk's way into storage --------------------------------------------------------------------------------

    def begin(self, entry: Entry, payload: Tensor, scores: Tensor | None) -> None:
        """A new chunk's pages are about to come in, from `payload`."""
        with self.lock:
            entry.incoming, entry.persisted, entry.scores = payload, False, scores
            self.stats.puts += 1

    def settled(self, entry: Entry) -> None:
        """The pages of a chunk have come in, or were not let in."""
        with self.lock:
            entry.incoming = None
            self.retire(entry)

    def queued(self, entry: Entry, payload: Tensor) -> None:
        """A chunk waits to be written: its pages are clean from now on."""
        with self.lock:
            entry.pending = payload
            self._mark(entry)

    def published(self, entry: Entry, done: bool) -> None:
        """The writing of a chunk has ended; where it failed, and pages are gone, the chunk is lost."""
        with self.lock:
            entry.pending, entry.persisted = None, done
            if not done and not all(
                any(n in a.held for a in self.arenas) for n in entry.ids(range(entry.layout.pages))
            ):
                self.lose(entry, "dropped: it could not be written")
                return
            self._mark(entry)
            self.retire(entry)

    def is_stored(self, entry: Entry) -> None:
        """A storage tier has the chunk: it was read from there."""
        with self.lock:
            if not entry.persisted:  # another thread's copy of the chunk was published meanwhile
                entry.persisted = True
                self._mark(entry)

    def _mark(self, entry: Entry) -> None:
        """Tell the tiers a chunk's dirty counts after they changed."""
        for arena in self.arenas:
            for page, number in enumerate(entry.ids(range(entry.layout.pages))):
                if number in arena.held:
                    arena.order.mark(number, entry.dirty(page))

    # --- private pages ---------------------------------------------------------------------------------------------

    def correct(self, entry: Entry, masks: Mapping[int, np.ndarray]) -> None:
        """Pages get new versions, with these corrected rows; what is kept of older ones is dropped."""
        with self.lock:
            self._forget_versions(entry, list(masks))
            entry.selected.update(masks)

    def begin_private(self, entry: Entry, payload: Tensor) -> None:
        """All pages of an owner's version are about to come in, from `payload`."""
        with self.lock:
            rows = entry.layout.rows_of
            self.correct(entry, {p: np.ones(rows(p), bool) for p in range(entry.layout.pages)})
            entry.incoming = payload

    def release(self, owner: str) -> int:
        """Drop all private pages of an owner unwritten; returns how many there were."""
        count = 0
        with self.lock:
            for name in self._owned.pop(owner, ()):
                entry = self._places.pop((name, owner), None)
                if entry is not None:
                    count += len(entry.selected)
                    self._forget_versions(entry, list(entry.selected))
                    self._numbers.pop(entry.number, None)
                    entry.lost = "released"
        return count

    def _forget_versions(self, entry: Entry, pages: Sequence[int]) -> None:
        ids = entry.ids(pages)
        for arena in self.arenas:
            self.drop(arena, ids)
        for number in ids:
            self._flight.pop(number, None)
        slots = [entry.spilled.pop(p) for p in pages if p in entry.spilled]
        if slots and self.spill is not None:
            self.spill.free(slots)

    def waits(self, entry: Entry, page: int, content: Tensor) -> bool:
        """Whether a page that was queued for the spill file is still the version that is wanted."""
        with self.lock:
            waiting = self._flight.get(entry.ids([page])[0])
            return waiting is not None and waiting.data_ptr() == content.data_ptr()

    def spilled(self, entry: Entry, page: int, slot: int) -> None:
        """A queued page lies in the spill file: it is clean."""
        with self.lock:
            number = entry.ids([page])[0]
            del self._flight[number]
            entry.spilled[page] = slot
            for arena in self.arenas:
                arena.mark([number], 0)

    def not_spilled(self, entry: Entry, page: int, why: str) -> None:
        """A queued page could not be written."""
        with self.lock:
            del self._flight[entry.ids([page])[0]]
            entry.lost = why

    # --- memory ----------------------------------------------------------------------------------------------------

    def tier_of(self, entry: Entry) -> str | None:
        """The highest memory tier that has all of a chunk ("queue": it waits to be written), None when none has."""
        with self.lock:
            ids = entry.ids(range(entry.layout.pages))
            for arena in self.arenas:
                if all(i in arena.held for i in ids):
                    return arena.name
            if entry.pending is not None:
                return "queue"
            return self.arenas[-1].name if all(any(i in a.held for a in self.arenas) for i in ids) else None

    def below(self, number: PageId) -> bool:
        """Whether a page is in the lower memory tier, or on its way down."""
        return number in self.arenas[1].held or number in self._flight

    def on_its_way(self, number: PageId) -> bool:
        """Whether a page has left a tier and not arrived in the next."""
        return number in self._flight

    def place(self, arena: Arena, pages: Sequence[Page], content: Tensor) -> None:
        """Hold pages in a tier that has room for them."""
        if not pages:
            return
        with self.lock:
            for entry, _ in pages:
                entry.holds += 1
                self._add(entry)
            arena.insert([e.ids([p])[0] for e, p in pages], content, [e.dirty(p) for e, p in pages])

    def drop(self, arena: Arena, numbers: Sequence[PageId], retire: bool = True) -> None:
        """Take pages out of a tier; with `retire`, forget entries of which nothing is left."""
        with self.lock:
            for n in numbers:
                if n in arena.held:
                    arena.drop([n])
                    entry = self._numbers[split(n)[0]]
                    entry.holds -= 1
                    if retire:
                        self.retire(entry)

    def depart(self, arena: Arena, numbers: Sequence[PageId]) -> Tensor:
        """Pages that leave a tier for the next: their content on the host, to be read until they have arrived."""
        with self.lock:
            content = arena.gather(numbers, touch=False).cpu()
            self._flight.update(zip(numbers, content, strict=True))
            return content

    def arrived(self, pages: Sequence[Page]) -> None:
        """Pages are where they were moved to, or no longer wanted there."""
        with self.lock:
            for entry, page in pages:
                self._flight.pop(entry.ids([page])[0], None)

    def gather(self, entry: Entry, pages: Sequence[int], touch: bool = True) -> Gathered:
        """Current versions of pages, as far as memory has them."""
        with self.lock:
            ids, width = entry.ids(pages), entry.layout.page_bytes
            got = Gathered(empty_pages(len(pages), width, self.arenas[0].device), missing=list(range(len(pages))))
            out = got.content
            for arena in self.arenas:
                here = [i for i in got.missing if ids[i] in arena.held]
                if here:
                    rows = arena.gather([ids[i] for i in here], touch)[:, :width]
                    out[torch.tensor(here, device=out.device)] = rows.to(out.device)
                    got.tiers.add(arena.name)
                    got.missing = [i for i in got.missing if ids[i] not in arena.held]
                    if arena is not self.arenas[0]:
                        got.climbing = [i for i in here if entry.dirty(pages[i]) == 0]
            for i in list(got.missing):
                if (waiting := self._flight.get(ids[i])) is not None:
                    out[i] = waiting[:width].to(out.device)
                    got.missing.remove(i)
                    got.tiers.add("host")
            queued = entry.pending if entry.pending is not None else entry.incoming
            if got.missing and queued is not None:
                rows = paged(queued, entry.layout)[[pages[i] for i in got.missing]]
                out[torch.tensor(got.missing, device=out.device)] = rows.to(out.device)
                got.missing, _ = [], got.tiers.add("host")
            got.slots = {i: entry.spilled.get(pages[i]) for i in got.missing if pages[i] in entry.selected}
            return got
