"""Work of the write-back threads: publish chunks, spill corrected pages, and mark pages clean."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cacheslide.errors import StoreError
from cacheslide.store.persistent.record import Encoded
from cacheslide.store.persistent.tiers import PersistentTiers
from cacheslide.store.slide.entry import Entry, PagesJob, RecordJob
from cacheslide.store.slide.table import PageTable
from cacheslide.store.slide.writeback import WriteBack


class PageWriter:
    """Writes for one store in its queue's threads; see `WriteBack` for the queue's limits."""

    def __init__(
        self,
        table: PageTable,
        persistent: PersistentTiers,
        queue_bytes: int,
        batch_bytes: int,
        stall_s: float,
        workers: int,
    ) -> None:
        self.table, self.persistent, self.stats = table, persistent, table.stats
        self.queue = WriteBack(self.write, queue_bytes, batch_bytes, stall_s, workers)

    def publish(self, entry: Entry, payload: Tensor) -> None:
        """Queue a new chunk for writing, waiting for room; without room it stays unwritten."""
        if self.queue.reserve(len(payload)):
            self.submit_record(entry, payload)
        else:
            self.stats.note("write-back queue full")

    def submit_record(self, entry: Entry, payload: Tensor) -> None:
        """Queue a chunk whose bytes were reserved; its pages are clean from now on."""
        self.table.queued(entry, payload)
        self.queue.submit(RecordJob(entry, payload, len(payload)))

    def write(self, jobs: Sequence[RecordJob | PagesJob]) -> None:
        """Run a batch of jobs, in a thread of the queue."""
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
        for job, done in zip(jobs, self.persistent.write(encoded), strict=True):
            self.table.published(job.entry, done)

    def _write_pages(self, jobs: list[PagesJob]) -> None:
        queued = [t for j in jobs for t in zip(j.entries, j.pages, j.content, strict=True)]
        todo = [t for t in queued if self.table.waits(*t)]  # replaced or released pages need not be written
        self.stats.cancelled += len(queued) - len(todo)
        todo.sort(key=lambda t: (t[0].number, t[1]))
        slots: list[int] = []
        spill = self.table.spill
        if todo:
            width = spill.page_bytes
            content = torch.stack([torch.nn.functional.pad(r[:width], (0, width - len(r[:width]))) for _, _, r in todo])
            try:
                slots = spill.write(content)
            except (OSError, StoreError) as error:
                self.stats.write_errors += 1
                self.stats.note(f"spill error {type(error).__name__}")
        with self.table.lock:
            unused = []
            for i, (entry, page, row) in enumerate(todo):
                if not self.table.waits(entry, page, row):
                    unused += slots[i : i + 1]
                elif not slots:
                    self.table.not_spilled(entry, page, "corrected pages were lost: they could not be written")
                    self.stats.dirty_dropped += 1
                else:
                    self.table.spilled(entry, page, slots[i])
                    self.stats.dirty_written += 1
            if unused:
                spill.free(unused)
            if slots:
                self.stats.spill_bytes += len(slots) * spill.slot_bytes
                self.stats.bytes_written += len(slots) * spill.slot_bytes
