"""Which page leaves a full tier first. The policies differ in nothing else: they see the same dirty counts.

A page is clean when a copy of the same version lies in a storage tier under it, so that dropping it writes nothing. A
dirty page carries a count: the selected tokens it holds (WCA rewrote their rows), or all its rows while it was never
written.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator

from cacheslide.errors import ConfigError

PageId = int  # entry number << 20 | page number: one chunk's pages are adjacent


class Eviction(ABC):
    """An order over the pages of one tier."""

    @abstractmethod
    def add(self, page: PageId, dirty: int) -> None:
        """A page has entered with this dirty count (0: clean)."""

    @abstractmethod
    def touch(self, page: PageId) -> None:
        """A page was read or written."""

    @abstractmethod
    def mark(self, page: PageId, dirty: int) -> None:
        """A page's dirty count has changed."""

    @abstractmethod
    def remove(self, page: PageId) -> None:
        """A page has left."""

    def yields_to_clean(self) -> int | None:
        """Pages that may leave for a clean page that comes in (None: any).

        The newcomer takes part in the order: where it would itself be the first victim, it is not let in.
        """
        return None

    @abstractmethod
    def victims(self) -> Iterator[PageId]:
        """Pages in the order in which they should leave; the tier must not change while this runs."""


class Lru(Eviction):
    """Least recently used first."""

    def __init__(self) -> None:
        self._pages: OrderedDict[PageId, None] = OrderedDict()

    def add(self, page: PageId, dirty: int) -> None:
        self._pages[page] = None

    def touch(self, page: PageId) -> None:
        self._pages.move_to_end(page)

    def mark(self, page: PageId, dirty: int) -> None:
        """The order does not depend on it."""

    def remove(self, page: PageId) -> None:
        del self._pages[page]

    def victims(self) -> Iterator[PageId]:
        return iter(self._pages)


class Fifo(Lru):
    """First in, first out."""

    def touch(self, page: PageId) -> None:
        """The order does not depend on it."""


class CleanFirst(Eviction):
    """Clean pages first, then dirty ones by descending count (paper section 4.4); least recently used within each."""

    def __init__(self) -> None:
        self._count: dict[PageId, int] = {}
        self._pages: dict[int, OrderedDict[PageId, None]] = {0: OrderedDict()}

    def add(self, page: PageId, dirty: int) -> None:
        self._count[page] = dirty
        self._pages.setdefault(dirty, OrderedDict())[page] = None

    def touch(self, page: PageId) -> None:
        self._pages[self._count[page]].move_to_end(page)

    def mark(self, page: PageId, dirty: int) -> None:
        if self._count[page] != dirty:
            self.remove(page)
            self.add(page, dirty)

    def remove(self, page: PageId) -> None:
        del self._pages[self._count.pop(page)][page]

    def yields_to_clean(self) -> int | None:
        return len(self._pages[0])

    def victims(self) -> Iterator[PageId]:
        yield from self._pages[0]
        for count in sorted(self._pages, reverse=True):
            if count:
                yield from self._pages[count]


POLICIES = {"clean-first": CleanFirst, "lru": Lru, "fifo": Fifo}


def eviction(name: str) -> Eviction:
    """A new order of this name; ConfigError when there is none."""
    if name not in POLICIES:
        raise ConfigError(f"unknown eviction policy {name!r}: choose {', '.join(POLICIES)}")
    return POLICIES[name]()
