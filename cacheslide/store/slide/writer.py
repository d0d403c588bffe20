"""The write-back threads' work: publish chunks, spill corrected pages, and note what is clean afterwards."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cacheslide.errors import StoreError
from cacheslide.store.persistent.record import Encoded
from cacheslide.store.slide.entry import Entry, PagesJob, RecordJob
from cacheslide.store.slide.table import PageTable
from cacheslide.store.slide.writeback import WriteBack


class PageWriter:
    """Writes for one store, in the threads of its queue; see `WriteBack` for the queue's limits."""

    def __init__(self, table: PageTable, queue_bytes: int, batch_bytes: int, stall_s: float, workers: int) -> None:
        self.table, self.stats, self.lock = table, table.stats, table.lock
        self.queue = WriteBack(self.write, queue_bytes, batch_bytes, stall_s, workers)

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
        self.table.mark(entry)
        self.queue.submit(RecordJob(entry, payload, len(payload)))

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
            Encoded.of_pages(
                j.entry.name, j.entry.layout, j.payload, j.entry.positions, j.entry.generation, j.entry.scores
            )
            for j in jobs
        ]
        kept = self.table.persistent.write(encoded)
        with self.lock:
            for job, done in zip(jobs, kept, strict=True):
                entry, entry.pending = job.entry, None
                entry.persisted = done
                ids = entry.ids(range(entry.layout.pages))
                if not done and not all(any(n in a.held for a in self.table.arenas) for n in ids):
                    self.table.forget_entry(entry, "dropped: it could not be written")
                    continue
                self.table.mark(entry)
                self.table.retire(entry)

    def _write_pages(self, jobs: list[PagesJob]) -> None:
        with self.lock:  # what was replaced or given up while it waited need not be written
            todo = [
                (e, p, row)
                for j in jobs
                for e, p, row in zip(j.entries, j.pages, j.content, strict=True)
                if self.table.flight.get(e.ids([p])[0]) is not None
                and self.table.flight[e.ids([p])[0]].data_ptr() == row.data_ptr()
            ]
            self.stats.cancelled += sum(len(j.pages) for j in jobs) - len(todo)
        todo.sort(key=lambda t: (t[0].number, t[1]))
        slots: list[int] = []
        if todo:
            spill = self.table.spill
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
                del self.table.flight[number]
                if not slots:
                    entry.lost = "corrected pages were lost: they could not be written"
                    self.stats.dirty_dropped += 1
                    continue
                entry.spilled[page] = slots[i]
                self.stats.dirty_written += 1
                for arena in self.table.arenas:
                    arena.mark([number], 0)
            if unused:
                self.table.spill.free(unused)
            if slots:
                self.stats.spill_bytes += len(slots) * self.table.spill.slot_bytes
                self.stats.bytes_written += len(slots) * self.table.spill.slot_bytes

    def _current(self, entry: Entry, page: int, row: Tensor) -> bool:
        """Whether a page that waited to be written is still the version that is wanted."""
        waiting = self.table.flight.get(entry.ids([page])[0])
        return waiting is not None and waiting.data_ptr() == row.data_ptr()
