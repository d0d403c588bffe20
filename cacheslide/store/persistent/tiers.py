"""The tiers that outlive the process, file and remote, behind one face that turns every failure into a miss.

Every kind of failure: what a file or a server makes the code below raise must not end the engine that asked.
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
    """A server that keeps whole records by name. Methods fail with OSError or StoreError, in bounded time."""

    def contains(self, name: bytes) -> bool:
        """Whether the record is there."""
        ...

    def read(self, name: bytes, accept: Accept = anything) -> tuple[Head, Tensor] | None:
        """The verified record; None when it is not there, Damaged when it is not what was written or not accepted."""
        ...

    def write(self, record: Encoded) -> int:
        """Keep a record; returns bytes sent, 0 when it was there already. NoRoom when it cannot be kept."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes the server holds for this store."""
        ...

    def close(self) -> None:
        """Let go of the server."""
        ...


@dataclass
class TieredStats(StoreStats):
    """Counts since the store was opened. Bytes are payload bytes unless said otherwise.

    `bytes_written` counts what went to disk, padding included: records, moves between the logs, and spilled pages.
    A page is `clean_dropped` when it left memory without a write, `dirty_written` when it had to be spilled, and
    `cancelled` or `released` when its owner gave it up before or without a write. `refused` counts chunks that are too
    large for the file tier, that the remote tier has no room for, or that were built on corrected KV too often.
    `damaged` records were not what had been written, `misfits` were whole and of another shape than the engine's.
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
        """Count a reason (its part before the first colon)."""
        head = why.split(":")[0]
        self.why[head] = self.why.get(head, 0) + 1


@dataclass
class PersistentTiers:
    """File and remote tier, either may be None."""

    file: FileTier | None
    remote: RemoteTier | None
    stats: TieredStats
    file_breaker: Breaker = field(default_factory=Breaker)
    remote_breaker: Breaker = field(default_factory=Breaker)

    @property
    def exists(self) -> bool:
        """Whether there is a tier under memory."""
        return self.file is not None or self.remote is not None

    def where(self, name: bytes) -> str | None:
        """Says "file", "remote" or None; a tier that fails or is left alone counts as not having it."""
        if self.file is not None:
            try:
                if self.file.contains(name):
                    return "file"
            except Exception as error:
                self._file_failed(error, reading=True)
        if self.remote is not None and not self.remote_breaker.open:
            try:
                found = self.remote.contains(name)
                self.remote_breaker.worked()
                return "remote" if found else None
            except Exception as error:
                self._remote_failed(error)
        return None

    def touch(self, name: bytes) -> None:
        """Tell the file tier that a chunk was served from memory, so that it keeps its copy."""
        if self.file is not None:
            place = self.file.shard(name).index.places.get(name)
            if place is not None and place.hits < 3:
                place.hits += 1

    def read(self, name: bytes, runs: Runs | None = None, accept: Accept = anything) -> tuple[Head, Tensor, str] | str:
        """Verified head, payload (or the pages of `runs`) and tier; or the reason why there is nothing to serve."""
        why = "absent"
        if self.file is not None:
            try:
                found = self.file.read(name, runs, accept)
                if found is not None:
                    return *found, "file"
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
            found = self.remote.read(name, accept)
            self.remote_breaker.worked()
        except Damaged as damage:
            self.remote_breaker.worked()
            return self._bad(damage)
        except Exception as error:
            self._remote_failed(error)
            return f"remote unavailable: {error}"
        if found is None:
            return why
        head, payload = found
        bounds = head.layout.bounds
        if runs is not None:
            if any(not 0 <= a < b <= head.layout.pages for a, b in runs):
                return self._bad(Damaged(f"it has {head.layout.pages} pages, others were asked for"))
            payload = torch.cat([payload[bounds[a] : bounds[b]] for a, b in runs])
        return head, payload, "remote"

    def _bad(self, damage: Damaged) -> str:
        """Count a record that cannot be used, and say why."""
        if isinstance(damage, Misfit):
            self.stats.misfits += 1
            return f"misfit: {damage}"
        self.stats.damaged += 1
        return f"damaged: {damage}"

    def write(self, records: Sequence[Encoded]) -> list[bool]:
        """Publish records; which of them are now in a storage tier."""
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
