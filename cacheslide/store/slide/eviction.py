"""Which page leaves a full tier first. The policies differ in nothing else: they see the same dirty counts.

A page is clean when a copy of the same version lies in a storage tier under it, so that dropping it writes nothing. A
dirty page carries a count: the selected tokens it holds (WCA rewrote their rows), or all its rows while it was never
written. A server's index of whole chunks orders their keys by the same classes (`vllm/scheduler/chunk_index.py`), with
bytes for counts.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

from cacheslide.errors import ConfigError

PageId = int  # entry number << 20 | page number: one chunk's pages are adjacent
K = TypeVar("K", bound=Hashable)  # what is ordered: pages of a tier by their ids, or chunks by their keys


class Eviction(ABC, Generic[K]):
    """An order over the pages of one tier."""

    @abstractmethod
    def add(self, page: K, dirty: int) -> None:
        """A page has entered with this dirty count (0: clean)."""

    @abstractmethod
    def touch(self, page: K) -> None:
        """A page was read or written."""

    @abstractmethod
    def mark(self, page: K, dirty: int) -> None:
        """A page's dirty count has changed."""

    @abstractmethod
    def remove(self, page: K) -> None:
        """A page has left."""

    def yields_to_clean(self) -> int | None:
        """Pages that may leave for a clean page that comes in (None: any).

        The newcomer takes part in the order: where it would itself be the first victim, it is not let in.
        """
        return None

    @abstractmethod
    def victims(self) -> Iterator[K]:
        """Pages in the order in which they should leave; the tier must not change while this runs."""


class Lru(Eviction[K]):
    """Least recently used first."""

    def __init__(self) -> None:
        self._pages: OrderedDict[K, None] = OrderedDict()

    def add(self, page: K, dirty: int) -> None:
        self._pages[page] = None

    def touch(self, page: K) -> None:
        self._pages.move_to_end(page)

    def mark(self, page: K, dirty: int) -> None:
        """The order does not depend on it."""

    def remove(self, page: K) -> None:
        del self._pages[page]

    def victims(self) -> Iterator[K]:
        return iter(self._pages)


class Fifo(Lru[K]):
    """First in, first out."""

    def touch(self, page: K) -> None:
        """The order does not depend on it."""


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
    """A new order of this name; ConfigError when there is none."""
    if name not in POLICIES:
        raise ConfigError(f"unknown eviction policy {name!r}: choose {', '.join(POLICIES)}")
    return POLICIES[name]()
