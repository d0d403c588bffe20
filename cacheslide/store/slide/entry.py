"""In-memory state of a chunk, or of one owner's corrected version of it, in the tiered store."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cacheslide.store.pages import MOST_PAGES, PageLayout
from cacheslide.store.slide.eviction import PageId

PAGE_BITS = MOST_PAGES.bit_length() - 1


@dataclass
class Entry:
    """A chunk's reference version (`owner` None), or an owner's private pages with corrections.

    Attributes
    ----------
    persisted : bool
        The reference version is published in the file or remote tier: its pages are clean.
    scores : Tensor [tokens], float32, on the CPU, or None
        Remembered deviations of the chunk's tokens; an owner's version has those of its reference version.
    pending : Tensor or None
        The payload while it is queued for writing.
    incoming : Tensor or None
        The payload while its pages enter memory: they enter in parts, and the first may be evicted again.
    selected : dict of int to bool array [rows]
        An owner's private pages, and the corrected rows of each.
    spilled : dict of int to int
        Private pages whose current version is in the spill file, with their slots.
    holds : int
        Pages stored in memory tiers, counted once per tier.
    lost : str
        Why the corrected version can no longer be read.
    """

    number: int
    name: bytes
    layout: PageLayout
    positions: Tensor
    generation: int
    owner: str | None = None
    persisted: bool = False
    scores: Tensor | None = None
    pending: Tensor | None = None
    incoming: Tensor | None = None
    selected: dict[int, np.ndarray] = field(default_factory=dict)
    spilled: dict[int, int] = field(default_factory=dict)
    holds: int = 0
    lost: str = ""

    def ids(self, pages) -> list[PageId]:
        """Page ids of page numbers."""
        base = self.number << PAGE_BITS
        return [base | p for p in pages]

    def dirty(self, page: int) -> int:
        """Corrected rows of a private page that is not spilled; all rows of a page never written; else 0."""
        if self.owner is not None:
            return 0 if page in self.spilled else int(self.selected[page].sum())
        return 0 if self.persisted or self.pending is not None else self.layout.rows_of(page)


Page = tuple[Entry, int]  # entry and page number


@dataclass
class RecordJob:
    """A chunk to publish."""

    entry: Entry
    payload: Tensor
    nbytes: int


@dataclass
class PagesJob:
    """Corrected pages to spill: uint8 [n, page_bytes]."""

    entries: list[Entry]
    pages: list[int]
    content: Tensor
    nbytes: int


def split(page: PageId) -> tuple[int, int]:
    """Entry number and page number."""
    return page >> PAGE_BITS, page & (1 << PAGE_BITS) - 1


def empty_pages(n: int, page_bytes: int, device: torch.device) -> Tensor:
    """Uninitialised memory for pages."""
    return torch.empty((n, page_bytes), dtype=torch.uint8, device=device)
