"""The file and remote tiers behind one interface that turns every failure into a miss.

Any exception from a file or a server is caught: it must not end the engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from cacheslide.store.base import StoreStats
from cacheslide.store.persistent.breaker import Breaker
from cacheslide.store.persistent.filetier import FileTier
from cacheslide.store.persistent.placed import Runs
from cacheslide.store.persistent.record import Accept, Damaged, Encoded, Head, Misfit, NoRoom, anything


class RemoteTier(Protocol):
    """A server that stores whole records by name. Methods fail with OSError or StoreError, in bounded time."""

    def contains(self, name: bytes) -> bool:
        """Whether the record is stored."""
        ...

    def read(self, name: bytes, accept: Accept = anything) -> tuple[Head, Tensor] | None:
        """The verified record; None if there is none, Damaged if it was altered or is not accepted."""
        ...

    def write(self, record: Encoded) -> int:
        """Store a record; returns bytes sent, 0 if it was stored already. NoRoom if there is no room for it."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes stored on the server for this store."""
        ...

    def close(self) -> None:
        """Disconnect."""
        ...


@dataclass
class TieredStats(StoreStats):
    """Counts since the store was opened, in payload bytes unless noted.

    `bytes_written` counts bytes written to disk including padding: records, moves between logs, spilled pages. A page
    is `clean_dropped` if it left memory without a write, `dirty_written` if it was spilled, and `cancelled` or
    `released` if its owner released it before or without a write. `refused` counts chunks too large for the file tier,
    chunks without room in the remote tier, and chunks above the maximum generation. `damaged` records were altered;
    `misfits` are sound but of another shape than the engine's.
    """

    hits_device: int = 0
    hits_host: int = 0
    hits_file: int = 0
    hits_remote: int = 0
    clean_dropped: int = 0
    dirty_written: int = 0
    dirty_dropped: int = 0
    cancelled: int = 0
    released: int = 0
    corrected: int = 0
    demoted: int = 0
    record_bytes: int = 0
    spill_bytes: int = 0
    spill_read_bytes: int = 0
    remote_bytes: int = 0
    misfits: int = 0
    read_errors: int = 0
    write_errors: int = 0
    remote_errors: int = 0
    lost: int = 0
    refused: int = 0
    why: dict[str, int] = field(default_factory=dict)

    def note(self, why: str) -> None:
        """Count a reason by its part before the first colon."""
        head = why.split(":")[0]
        self.why[head] = self.why.get(head, 0) + 1


@dataclass
class PersistentTiers:
    """File and remote tier; either may be None."""

    file: FileTier | None
    remote: RemoteTier | None
    stats: TieredStats
    file_breaker: Breaker = field(default_factory=Breaker)
    remote_breaker: Breaker = field(default_factory=Breaker)

    @property
    def exists(self) -> bool:
        """Whether there is a tier."""
        return self.file is not None or self.remote is not None

    def where(self, name: bytes) -> str | None:
        """ "file", "remote" or None; a failing tier counts as not having the chunk."""
        if self.file is not None:
            try:
                if self.file.contains(name):
                    return "file"
            except Exception as error:
                self._file_failed(error, reading=True)
        if self.remote is not None and not self.remote_breaker.open:
            try:
                stored = self.remote.contains(name)
                self.remote_breaker.worked()
                return "remote" if stored else None
            except Exception as error:
                self._remote_failed(error)
        return None

    def touch(self, name: bytes) -> None:
        """Count a use of a chunk served from memory, so that the file tier keeps its copy."""
        if self.file is not None:
            place = self.file.shard(name).index.places.get(name)
            if place is not None and place.hits < 3:
                place.hits += 1

    def read(self, name: bytes, runs: Runs | None = None, accept: Accept = anything) -> tuple[Head, Tensor, str] | str:
        """Verified head, payload (or the pages of `runs`) and tier; or the reason for a miss."""
        why = "absent"
        if self.file is not None:
            try:
                record = self.file.read(name, runs, accept)
                if record is not None:
                    return *record, "file"
            except Damaged as damage:
                why = self._bad(damage)
            except Exception as error:
                self._file_failed(error, reading=True)
                why = f"read error: {error}"
        if self.remote is None:
            return why
        if self.remote_breaker.open:
            return f"remote unavailable: {self.remote_breaker.last_error}" if why == "absent" else why
        try:
            record = self.remote.read(name, accept)
            self.remote_breaker.worked()
        except Damaged as damage:
            self.remote_breaker.worked()
            return self._bad(damage)
        except Exception as error:
            self._remote_failed(error)
            return f"remote unavailable: {error}"
        if record is None:
            return why
        head, payload = record
        bounds = head.layout.bounds
        if runs is not None:
            if any(not 0 <= a < b <= head.layout.pages for a, b in runs):
                return self._bad(Damaged(f"it has {head.layout.pages} pages, others were asked for"))
            payload = torch.cat([payload[bounds[a] : bounds[b]] for a, b in runs])
        return head, payload, "remote"

    def _bad(self, damage: Damaged) -> str:
        """Count a record that cannot be used; returns the reason."""
        if isinstance(damage, Misfit):
            self.stats.misfits += 1
            return f"misfit: {damage}"
        self.stats.damaged += 1
        return f"damaged: {damage}"

    def write(self, records: Sequence[Encoded]) -> list[bool]:
        """Publish records; returns for each whether it is now in a tier."""
        kept = [False] * len(records)
        if self.file is not None and not self.file_breaker.open:
            fitting = [r for r in records if r.size <= self.file.largest]
            self.stats.refused += len(records) - len(fitting)
            try:
                self.stats.record_bytes += self.file.write(fitting)
                self.file_breaker.worked()
            except Exception as error:
                self._file_failed(error)
            self.stats.bytes_written = self._disk_bytes()
            kept = [self._published(r) for r in records]
        if self.remote is not None and not self.remote_breaker.open:
            for i, r in enumerate(records):
                try:
                    self.stats.remote_bytes += self.remote.write(r)
                    self.remote_breaker.worked()
                    kept[i] = True
                except NoRoom:
                    self.stats.refused += 1
                    self.remote_breaker.worked()
                except Exception as error:
                    self._remote_failed(error)
                    break
        return kept

    def _disk_bytes(self) -> int:
        return sum(s.stats.bytes_appended + s.stats.bytes_moved for s in self.file.shards) + self.stats.spill_bytes

    def _published(self, record: Encoded) -> bool:
        try:
            return self.file.contains(record.name)
        except Exception:
            return False

    def _file_failed(self, error: BaseException, reading: bool = False) -> None:
        if reading:
            self.stats.read_errors += 1
            return
        self.stats.write_errors += 1
        self.stats.note(f"write error {type(error).__name__}")
        if isinstance(error, OSError):
            self.file_breaker.failed(error)

    def _remote_failed(self, error: BaseException) -> None:
        self.stats.remote_errors += 1
        self.remote_breaker.failed(error)
