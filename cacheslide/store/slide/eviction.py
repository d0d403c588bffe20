"""Eviction orders of a full tier. The policies differ in the order only: they see the same dirty counts.

A page is clean if a storage tier below holds a copy of its version: dropping it writes nothing. A dirty page has a
count: the selected tokens in it (rows rewritten by WCA), or all its rows if it was never written. A server's index of
chunks uses the same orders for keys (`vllm/scheduler/chunk_index.py`), with bytes as counts.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

from cacheslide.errors import ConfigError

PageId = int  # entry number << 20 | page number: one chunk's pages are adjacent
K = TypeVar("K", bound=Hashable)  # items ordered: page ids of a tier, or chunk keys


class Eviction(ABC, Generic[K]):
    """An order of one tier's pages."""

    @abstractmethod
    def add(self, page: K, dirty: int) -> None:
        """Add a page with this dirty count (0: clean)."""

    @abstractmethod
    def touch(self, page: K) -> None:
        """Record a read or write of a page."""

    @abstractmethod
    def mark(self, page: K, dirty: int) -> None:
        """Set a page's dirty count."""

    @abstractmethod
    def remove(self, page: K) -> None:
        """Remove a page."""

    def yields_to_clean(self) -> int | None:
        """Number of pages that may be evicted for an incoming clean page (None: any).

        The new page takes part in the order: if it would be the first victim itself, it is not stored.
        """
        return None

    @abstractmethod
    def victims(self) -> Iterator[K]:
        """Pages in the order of eviction; the tier must not change during iteration."""


class Lru(Eviction[K]):
    """Least recently used first."""

    def __init__(self) -> None:
        self._pages: OrderedDict[K, None] = OrderedDict()

    def add(self, page: K, dirty: int) -> None:
        self._pages[page] = None

    def touch(self, page: K) -> None:
        self._pages.move_to_end(page)

    def mark(self, page: K, dirty: int) -> None:
        """Does nothing: the order does not depend on dirty counts."""

    def remove(self, page: K) -> None:
        del self._pages[page]

    def victims(self) -> Iterator[K]:
        return iter(self._pages)


class Fifo(Lru[K]):
    """First in, first out."""

    def touch(self, page: K) -> None:
        """Does nothing: the order does not depend on uses."""


class CleanFirst(Eviction[K]):
    """Clean pages first, then dirty ones by descending count (paper section 4.4); least recently used within each."""

    def __init__(self) -> None:
        self._count: dict[K, int] = {}
        self._pages: dict[int, OrderedDict[K, None]] = {0: OrderedDict()}

    def add(self, page: K, dirty: int) -> None:
        self._count[page] = dirty
        self._pages.setdefault(dirty, OrderedDict())[page] = None

    def touch(self, page: K) -> None:
        self._pages[self._count[page]].move_to_end(page)

    def mark(self, page: K, dirty: int) -> None:
        if self._count[page] != dirty:
            self.remove(page)
            self.add(page, dirty)

    def remove(self, page: K) -> None:
        del self._pages[self._count.pop(page)][page]

    def yields_to_clean(self) -> int | None:
        return len(self._pages[0])

    def victims(self) -> Iterator[K]:
        yield from self._pages[0]
        for count in sorted(self._pages, reverse=True):
            if count:
                yield from self._pages[count]


POLICIES = {"clean-first": CleanFirst, "lru": Lru, "fifo": Fifo}


def eviction(name: str) -> Eviction:
    """A new order by name; ConfigError for an unknown name."""
    if name not in POLICIES:
        raise ConfigError(f"unknown eviction policy {name!r}: choose {', '.join(POLICIES)}")
    return POLICIES[name]()
