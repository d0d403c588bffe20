"""A memory tier: page slots in one tensor, on a GPU, in pinned or in plain host memory."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cacheslide.errors import StoreError
from cacheslide.store.slide.eviction import PageId, eviction


class Arena:
    """At most `capacity` bytes of page slots, allocated once, so the limit cannot be exceeded.

    Parameters
    ----------
    name : str
        "device" or "host", for statistics.
    capacity, page_bytes : int
        Total bytes, and bytes per slot.
    policy : str
        See `eviction`.
    """

    def __init__(self, name: str, capacity: int, page_bytes: int, device: str, policy: str) -> None:
        slots = capacity // page_bytes
        if slots < 1:
            raise StoreError(f"the {name} tier of {capacity} bytes cannot hold one page of {page_bytes} bytes")
        pin = name == "host" and torch.cuda.is_available()
        self.name, self.page_bytes, self.device = name, page_bytes, torch.device(device)
        self.slots = torch.empty((slots, page_bytes), dtype=torch.uint8, device=self.device, pin_memory=pin)
        self.order = eviction(policy)
        self.held: dict[PageId, int] = {}
        self._free = list(range(slots - 1, -1, -1))

    @property
    def room(self) -> int:
        """Free slots."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of the slots in use."""
        return len(self.held) * self.page_bytes

    @property
    def capacity(self) -> int:
        """Bytes of all slots."""
        return self.slots.numel()

    def insert(self, pages: Sequence[PageId], content: Tensor, dirty: Sequence[int]) -> None:
        """Store pages, replacing older versions; content uint8 [n, <= page_bytes]. New pages need free slots."""
        where = []
        for page, count in zip(pages, dirty, strict=True):
            slot = self.held.get(page)
            if slot is None:
                slot = self.held[page] = self._free.pop()
                self.order.add(page, count)
            else:
                self.order.mark(page, count)
                self.order.touch(page)
            where.append(slot)
        index = torch.tensor(where, device=self.device)
        self.slots[:, : content.shape[1]].index_copy_(0, index, content.to(self.device, non_blocking=True))

    def gather(self, pages: Sequence[PageId], touch: bool = True) -> Tensor:
        """Copies of stored pages: uint8 [n, page_bytes] on the tier's device."""
        if touch:
            for page in pages:
                self.order.touch(page)
        return self.slots.index_select(0, torch.tensor([self.held[p] for p in pages], device=self.device))

    def drop(self, pages: Iterable[PageId]) -> None:
        """Free the slots of pages; others are ignored."""
        for page in pages:
            slot = self.held.pop(page, None)
            if slot is not None:
                self.order.remove(page)
                self._free.append(slot)

    def mark(self, pages: Iterable[PageId], dirty: int) -> None:
        """Set the dirty count of stored pages."""
        for page in pages:
            if page in self.held:
                self.order.mark(page, dirty)
