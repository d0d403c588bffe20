"""Reads the current version of pages from any tier, and moves pages read from storage into memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cacheslide.errors import StoreError
from cacheslide.store.base import ChunkKV
from cacheslide.store.pages import from_payload, paged
from cacheslide.store.persistent.placed import Runs
from cacheslide.store.persistent.record import Encoded
from cacheslide.store.persistent.shape import Wanted
from cacheslide.store.persistent.tiers import PersistentTiers
from cacheslide.store.slide.entry import Entry
from cacheslide.store.slide.mover import Mover
from cacheslide.store.slide.spill import runs
from cacheslide.store.slide.table import PageTable


class Gone(Exception):
    """A page is not available; the message is the reason."""


class PageReader:
    """Reads for one store records accepted by `wanted`, without holding the table's lock during reads."""

    def __init__(self, table: PageTable, mover: Mover, persistent: PersistentTiers, wanted: Wanted) -> None:
        self.table, self.mover, self.persistent, self.wanted = table, mover, persistent, wanted

    def pages(self, entry: Entry, pages: Sequence[int]) -> tuple[Tensor, str]:
        """Current versions of pages, uint8 [n, page_bytes] on the first tier's device, and the lowest tier used."""
        if entry.lost:
            raise Gone(entry.lost)
        pages = list(pages)
        got = self.table.gather(entry, pages)
        out, tiers, private = got.content, got.tiers, list(got.slots)
        if private:
            rows = self._unspill(entry, list(got.slots.values()))
            out[torch.tensor(private, device=out.device)] = rows.to(out.device)
            tiers.add("file")
        rest = [i for i in got.missing if i not in got.slots]
        if rest:
            rows, tier = self._base_pages(entry, [pages[i] for i in rest])
            out[torch.tensor(rest, device=out.device)] = rows.to(out.device)
            tiers.add(tier)
        come = got.climbing + private + (rest if entry.owner is None else [])
        if come and len(come) <= len(self.table.arenas[0].slots):
            self.mover.insert(self.table.arenas[0], [(entry, pages[i]) for i in come], out[come], only_current=True)
        self.table.retire(entry)
        return out, max(tiers, key=("device", "host", "file", "remote").index)

    def _unspill(self, entry: Entry, slots: list[int | None]) -> Tensor:
        if None in slots or self.table.spill is None:
            entry.lost = entry.lost or "corrected pages were lost: no room to spill them"
            raise Gone(entry.lost)
        try:
            pages = self.table.spill.read(slots)[:, : entry.layout.page_bytes]
        except (OSError, StoreError) as error:
            self.table.stats.read_errors += 1
            entry.lost = f"corrected pages were lost: {error}"
            raise Gone(entry.lost) from None
        self.table.stats.spill_read_bytes += pages.numel()
        return pages

    def _base_pages(self, entry: Entry, pages: list[int]) -> tuple[Tensor, str]:
        """Pages of the reference version, from its memory tiers or from storage."""
        if entry.owner is not None:
            base = self.table.version(entry.name, None)
            if base is None:
                base = self.table.entry(
                    entry.name, entry.layout, entry.positions, entry.generation, persisted=True, scores=entry.scores
                )
            return self.pages(base, pages)
        wanted: Runs = [(pages[a], pages[b - 1] + 1) for a, b in runs(pages)]
        record = self.persistent.read(entry.name, wanted, self.wanted)
        if isinstance(record, str):
            with self.table.lock:
                if entry.pending is None:
                    self.table.lose(entry, record)
            raise Gone(record)
        head, payload, tier = record
        if head.layout != entry.layout:
            raise Gone("another layout: written with other page sizes")
        self.table.is_stored(entry)
        bounds, at, parts = entry.layout.bounds, 0, []
        for p in pages:
            size = bounds[p + 1] - bounds[p]
            parts.append(torch.nn.functional.pad(payload[at : at + size], (0, entry.layout.page_bytes - size)))
            at += size
        return torch.stack(parts), tier

    def load(self, name: bytes, wanted: Wanted) -> tuple[ChunkKV, str]:
        """Load a chunk that has no entry in memory."""
        record = self.persistent.read(name, accept=wanted)
        if isinstance(record, str):
            raise Gone(record)
        head, payload, tier = record
        if tier == "remote" and self.persistent.file is not None:
            self.persistent.write([Encoded.of_head(name, head, payload)])
        payload = payload.to(self.table.arenas[0].device)
        if head.layout.pages <= len(self.table.arenas[0].slots):
            entry = self.table.entry(
                name, head.layout, head.positions, head.generation, persisted=True, scores=head.scores
            )
            pages = [(entry, p) for p in range(head.layout.pages)]
            self.mover.insert(self.table.arenas[0], pages, paged(payload, head.layout), only_current=True)
        return from_payload(payload, head.layout, head.positions.clone(), head.generation, head.scores), tier
