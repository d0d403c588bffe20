"""The write-back threads' work: publish chunks, spill corrected pages, and note what is clean afterwards."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cacheslide.errors import StoreError
from cacheslide.store.entry import Entry, PagesJob, RecordJob
from cacheslide.store.record import Encoded
from cacheslide.store.writeback import WriteBack

if TYPE_CHECKING:
    from cacheslide.store.mover import Mover
    from cacheslide.store.tiered import TieredChunkStore


class PageWriter:
    """Writes for one store."""

    queue: WriteBack

    def __init__(self, store: "TieredChunkStore", mover: "Mover") -> None:
        self.store, self.mover, self.stats, self.lock = store, mover, store.stats, store._lock

    def publish(self, entry: Entry, payload: Tensor) -> None:
        """Queue a new chunk for writing, waiting for room in the queue; when there is none it stays unwritten."""
        if self.queue.reserve(len(payload)):
            with self.lock:
                self.submit_record(entry, payload)
        else:
            self.stats.note("write-back queue full")

    def submit_record(self, entry: Entry, payload: Tensor) -> None:
        """Queue a chunk whose bytes were reserved; its pages are clean from now on."""
        entry.pending = payload
        self.mark(entry)
        self.queue.submit(RecordJob(entry, payload, len(payload)))

    def mark(self, entry: Entry) -> None:
        """Tell the tiers a chunk's dirty counts after they changed."""
        for arena in self.store.arenas:
            for page, number in enumerate(entry.ids(range(entry.layout.pages))):
                if number in arena.held:
                    arena.order.mark(number, entry.dirty(page))

    def write(self, jobs: Sequence[RecordJob | PagesJob]) -> None:
        """The queue's thread."""
        records = [j for j in jobs if isinstance(j, RecordJob)]
        if records:
            self._write_records(records)
        pages = [j for j in jobs if isinstance(j, PagesJob)]
        if pages:
            self._write_pages(pages)

    def _write_records(self, jobs: list[RecordJob]) -> None:
        encoded = [
            Encoded.of_pages(j.entry.name, j.entry.layout, j.payload, j.entry.positions, j.entry.generation)
            for j in jobs
        ]
        kept = self.store.backing.write(encoded)
        with self.lock:
            for job, done in zip(jobs, kept, strict=True):
                entry, entry.pending = job.entry, None
                entry.backed = done
                ids = entry.ids(range(entry.layout.pages))
                if not done and not all(any(n in a.held for a in self.store.arenas) for n in ids):
                    self.mover.forget_entry(entry, "dropped: it could not be written")
                    continue
                self.mark(entry)
                self.mover.retire(entry)

    def _write_pages(self, jobs: list[PagesJob]) -> None:
        with self.lock:  # what was replaced or given up while it waited need not be written
            todo = [
                (e, p, row)
                for j in jobs
                for e, p, row in zip(j.entries, j.pages, j.content, strict=True)
                if self.mover.flight.get(e.ids([p])[0]) is not None
                and self.mover.flight[e.ids([p])[0]].data_ptr() == row.data_ptr()
            ]
            self.stats.cancelled += sum(len(j.pages) for j in jobs) - len(todo)
        todo.sort(key=lambda t: (t[0].number, t[1]))
        slots: list[int] = []
        if todo:
            spill = self.store.spill
            width = spill.page_bytes
            content = torch.stack([torch.nn.functional.pad(r[:width], (0, width - len(r[:width]))) for _, _, r in todo])
            try:
                slots = spill.write(content)
            except (OSError, StoreError) as error:
                self.stats.write_errors += 1
                self.stats.note(f"spill error {type(error).__name__}")
        with self.lock:
            unused = []
            for i, (entry, page, row) in enumerate(todo):
                number = entry.ids([page])[0]
                if not self._current(entry, page, row):
                    unused += slots[i : i + 1]
                    continue
                del self.mover.flight[number]
                if not slots:
                    entry.lost = "corrected pages were lost: they could not be written"
                    self.stats.dirty_dropped += 1
                    continue
                entry.spilled[page] = slots[i]
                self.stats.dirty_written += 1
                for arena in self.store.arenas:
                    arena.mark([number], 0)
            if unused:
                self.store.spill.free(unused)
            if slots:
                self.stats.spill_bytes += len(slots) * self.store.spill.slot_bytes
                self.stats.bytes_written += len(slots) * self.store.spill.slot_bytes

    def _current(self, entry: Entry, page: int, row: Tensor) -> bool:
        """Whether a page that waited to be written is still the version that is wanted."""
        waiting = self.mover.flight.get(entry.ids([page])[0])
        return waiting is not None and waiting.data_ptr() == row.data_ptr()
