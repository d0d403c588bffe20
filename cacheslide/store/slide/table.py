"""A store's pages under one lock: entries, memory tiers, pages being moved, and all changes of them."""

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
    """The pages that memory had at one moment; numbers are indices into the requested pages.

    Attributes
    ----------
    content : Tensor [n, page_bytes], uint8
        On the first tier's device; undefined for `missing` pages.
    tiers : set of str
        Tiers of the other pages.
    missing : list of int
    climbing : list of int
        Clean pages in a lower tier.
    slots : dict of int to (int or None)
        Private pages among the missing ones, with their slots in the spill file (None: lost).
    """

    content: Tensor
    tiers: set[str] = field(default_factory=set)
    missing: list[int] = field(default_factory=list)
    climbing: list[int] = field(default_factory=list)
    slots: dict[int, int | None] = field(default_factory=dict)


class PageTable:
    """The state of a store's pages. Thread-safe; methods change memory only, and none waits for a disk.

    To make several steps atomic, hold `lock`, which every method takes too.

    Parameters
    ----------
    arenas : list of Arena
        Memory tiers, the fastest first.
    spill : SpillFile or None
        Spill file of private pages; the table frees its slots.
    """

    def __init__(self, arenas: list[Arena], spill: SpillFile | None, stats: TieredStats) -> None:
        self.arenas, self.spill, self.stats = arenas, spill, stats
        self.lock = threading.RLock()
        self._places: dict[tuple[bytes, str | None], Entry] = {}
        self._numbers: dict[int, Entry] = {}
        self._owned: dict[str, set[bytes]] = {}
        self._flight: dict[PageId, Tensor] = {}  # pages moving between tiers
        self._next = itertools.count()

    # --- entries ---------------------------------------------------------------------------------------------------

    def find(self, name: bytes, owner: str | None = None) -> Entry | None:
        """An owner's version of a chunk, or else the reference version."""
        with self.lock:
            return self._places.get((name, owner)) or self._places.get((name, None))

    def version(self, name: bytes, owner: str | None) -> Entry | None:
        """An owner's version of a chunk only; the reference version for None."""
        with self.lock:
            return self._places.get((name, owner))

    def page(self, number: PageId) -> Page:
        """Entry and page number of a page that is stored or being moved."""
        entry, page = split(number)
        return self._numbers[entry], page

    def references(self) -> set[bytes]:
        """Names of all chunks with an entry."""
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
        """The entry of a version; a new one if there is none that can still be completed."""
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
        """Remove a reference entry without pages in memory."""
        with self.lock:
            if entry.owner is None and not entry.holds and entry.pending is None:
                if self._places.get((entry.name, None)) is entry:
                    del self._places[entry.name, None]
                self._numbers.pop(entry.number, None)

    def lose(self, entry: Entry, why: str) -> None:
        """Drop a reference chunk from memory, since it can no longer be completed."""
        with self.lock:
            entry.lost = why
            self.stats.lost += 1
            ids = entry.ids(range(entry.layout.pages))
            for arena in self.arenas:
                self.drop(arena, ids)
            self.retire(entry)

    # --- a chunk's way into storage --------------------------------------------------------------------------------

    def begin(self, entry: Entry, payload: Tensor, scores: Tensor | None) -> None:
        """Start inserting a new chunk's pages from `payload`."""
        with self.lock:
            entry.incoming, entry.persisted, entry.scores = payload, False, scores
            self.stats.puts += 1

    def settled(self, entry: Entry) -> None:
        """A chunk's pages have been inserted or refused."""
        with self.lock:
            entry.incoming = None
            self.retire(entry)

    def queued(self, entry: Entry, payload: Tensor) -> None:
        """A chunk was queued for writing: its pages are clean from now on."""
        with self.lock:
            entry.pending = payload
            self._mark(entry)

    def published(self, entry: Entry, done: bool) -> None:
        """Writing a chunk has ended; if it failed and pages are gone, the chunk is lost."""
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
        """A storage tier has the chunk, which was read from there."""
        with self.lock:
            if not entry.persisted:  # another thread's copy was published meanwhile
                entry.persisted = True
                self._mark(entry)

    def _mark(self, entry: Entry) -> None:
        """Update the tiers with a chunk's changed dirty counts."""
        for arena in self.arenas:
            for page, number in enumerate(entry.ids(range(entry.layout.pages))):
                if number in arena.held:
                    arena.order.mark(number, entry.dirty(page))

    # --- private pages ---------------------------------------------------------------------------------------------

    def correct(self, entry: Entry, masks: Mapping[int, np.ndarray]) -> None:
        """Give pages new versions with these corrected rows; older versions are dropped."""
        with self.lock:
            self._forget_versions(entry, list(masks))
            entry.selected.update(masks)

    def begin_private(self, entry: Entry, payload: Tensor) -> None:
        """Start inserting all pages of an owner's version from `payload`."""
        with self.lock:
            rows = entry.layout.rows_of
            self.correct(entry, {p: np.ones(rows(p), bool) for p in range(entry.layout.pages)})
            entry.incoming = payload

    def release(self, owner: str) -> int:
        """Drop all private pages of an owner unwritten; returns their number."""
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
        """Whether a page queued for the spill file is still its current version."""
        with self.lock:
            waiting = self._flight.get(entry.ids([page])[0])
            return waiting is not None and waiting.data_ptr() == content.data_ptr()

    def spilled(self, entry: Entry, page: int, slot: int) -> None:
        """A queued page was written to the spill file: it is clean."""
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
        """The highest memory tier with all of a chunk ("queue": it is queued for writing); None if there is none."""
        with self.lock:
            ids = entry.ids(range(entry.layout.pages))
            for arena in self.arenas:
                if all(i in arena.held for i in ids):
                    return arena.name
            if entry.pending is not None:
                return "queue"
            return self.arenas[-1].name if all(any(i in a.held for a in self.arenas) for i in ids) else None

    def below(self, number: PageId) -> bool:
        """Whether a page is in the lower memory tier, or moving there."""
        return number in self.arenas[1].held or number in self._flight

    def on_its_way(self, number: PageId) -> bool:
        """Whether a page is being moved between tiers."""
        return number in self._flight

    def place(self, arena: Arena, pages: Sequence[Page], content: Tensor) -> None:
        """Store pages in a tier with free slots for them."""
        if not pages:
            return
        with self.lock:
            for entry, _ in pages:
                entry.holds += 1
                self._add(entry)
            arena.insert([e.ids([p])[0] for e, p in pages], content, [e.dirty(p) for e, p in pages])

    def drop(self, arena: Arena, numbers: Sequence[PageId], retire: bool = True) -> None:
        """Remove pages from a tier; with `retire`, remove entries that have no pages left."""
        with self.lock:
            for n in numbers:
                if n in arena.held:
                    arena.drop([n])
                    entry = self._numbers[split(n)[0]]
                    entry.holds -= 1
                    if retire:
                        self.retire(entry)

    def depart(self, arena: Arena, numbers: Sequence[PageId]) -> Tensor:
        """Take pages out of a tier to move them: their content on the host, readable until they have arrived."""
        with self.lock:
            content = arena.gather(numbers, touch=False).cpu()
            self._flight.update(zip(numbers, content, strict=True))
            return content

    def arrived(self, pages: Sequence[Page]) -> None:
        """Pages have been moved, or are no longer needed."""
        with self.lock:
            for entry, page in pages:
                self._flight.pop(entry.ids([page])[0], None)

    def gather(self, entry: Entry, pages: Sequence[int], touch: bool = True) -> Gathered:
        """Current versions of pages that memory has."""
        with self.lock:
            ids, width = entry.ids(pages), entry.layout.page_bytes
            got = Gathered(empty_pages(len(pages), width, self.arenas[0].device), missing=list(range(len(pages))))
            out = got.content
            for arena in self.arenas:
                present = [i for i in got.missing if ids[i] in arena.held]
                if present:
                    rows = arena.gather([ids[i] for i in present], touch)[:, :width]
                    out[torch.tensor(present, device=out.device)] = rows.to(out.device)
                    got.tiers.add(arena.name)
                    got.missing = [i for i in got.missing if ids[i] not in arena.held]
                    if arena is not self.arenas[0]:
                        got.climbing = [i for i in present if entry.dirty(pages[i]) == 0]
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
