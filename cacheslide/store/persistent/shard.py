"""One shard: an append-only, bounded, crash-safe log of chunk records, shared by several processes.

Two logs protect used chunks from scans. New chunks enter the young log; chunks read before their segment is emptied,
and chunks that return soon after they were dropped, move to the kept log (as in S3-FIFO, by segments). Room is made
by removing segments before anything is written: the files never exceed the capacity.

A record that cannot be used, damaged or of another shape, is struck out on disk, so that it does not hide a sound one.
"""

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from cacheslide.errors import StoreError
from cacheslide.store.files import BLOCK, Files, aligned_buffer, host_buffer
from cacheslide.store.folder import Folder, Foreign
from cacheslide.store.lock import WriterLock
from cacheslide.store.persistent.index import REFRESH_S, Location, Segment, ShardIndex
from cacheslide.store.persistent.placed import Runs, read_placed, strike_out
from cacheslide.store.persistent.record import Accept, Damaged, Encoded, Head, anything
from cacheslide.store.persistent.segments import KEPT, MOST_NUMBER, YOUNG, SegmentFolder, ShardHead

logger = logging.getLogger("cacheslide.store")

MAX_HITS = 3
_TRIES = 1000  # names tried for a new segment
_MOST_STRUCK = 1000  # records waiting for the lock to be struck out
_YOUNG_SHARE = 0.1  # of the capacity, up to which the young log is not emptied first


@dataclass
class ShardStats:
    """Counts since the shard was opened."""

    appended: int = 0
    bytes_appended: int = 0
    bytes_moved: int = 0
    evicted: int = 0
    damaged: int = 0
    vanished: int = 0
    recovered: int = 0


class Shard:
    """Records under `path`. Thread-safe; several processes may open the same folder.

    Parameters
    ----------
    capacity : int
        Maximum bytes of all segment files, across all processes.
    segment_bytes : int
        Size at which a segment is sealed; at most an eighth of the capacity.
    lock_timeout_s : float
        Maximum wait of a writer for other processes.
    direct : bool
        Bypass the page cache if the file system supports it.
    durable : bool
        Sync data to the device before a record is published, so that it survives a power cut.
    shared : bool
        See `Folder`.
    strike : bool
        Strike out records that cannot be used; False leaves the folder unchanged.
    limit_s : float
        Seconds for indexing existing records now; later look-ups index the rest.
    """

    def __init__(
        self,
        path: Path,
        capacity: int,
        segment_bytes: int,
        files: Files | None = None,
        *,
        lock_timeout_s: float = 10.0,
        direct: bool = False,
        durable: bool = True,
        shared: bool = False,
        strike: bool = True,
        limit_s: float = REFRESH_S,
    ) -> None:
        self.path, self.capacity, self.files, self.durable = path, capacity, files or Files(), durable
        self.direct, self.strike = direct, strike
        self.segment_bytes = max(2 * BLOCK, min(segment_bytes, capacity // 8) // BLOCK * BLOCK)
        folder = Folder(path, self.files, shared=shared)
        self.folder = SegmentFolder(folder, self.files, direct)
        self.lock = WriterLock(folder, lock_timeout_s)
        self.index = ShardIndex(self.folder)
        self.stats = ShardStats()
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()
        self._struck: list[tuple[bytes, Location, bytes]] = []
        try:
            folder.make()
            self.index.refresh(limit_s=limit_s)
        except Foreign as wrong:  # other shards are not affected
            logger.warning("CacheSlide's store goes on without one of its folders: %s", wrong)

    # --- reading ---------------------------------------------------------------------------------------------------

    def read(self, name: bytes, runs: Runs | None = None, accept: Accept = anything) -> tuple[Head, Tensor] | None:
        """Head and payload, or the concatenated pages of `runs` ([first, last) each); checksums verified.

        None if the chunk is not stored (any more), Damaged if the record was altered or is not accepted (it is then
        forgotten and struck out), OSError if the disk fails, Foreign if the folder is not the store's.
        """
        for _ in range(2):  # a record may move during the look-up: tried twice
            place = self.index.find(name)
            if place is None:
                return None
            try:
                if (salt := self.index.salt(place)) is None:
                    raise FileNotFoundError
                record = read_placed(self.folder, name, place, salt, runs, self.files.buffer, accept)
            except FileNotFoundError:
                self.index.drop(name, place)
                self.index.refresh(force=True)
                self.stats.vanished += 1
                continue
            except Damaged:
                self.index.drop(name, place)
                self.stats.damaged += 1
                if self.strike:
                    self._strike_out(name, place, salt)
                raise
            place.hits = min(MAX_HITS, place.hits + 1)
            return record
        return None

    def _strike_out(self, name: bytes, place: Location, salt: bytes) -> None:
        """Strike a record out now or, while another writer holds the lock, with the next append."""
        if len(self._struck) < _MOST_STRUCK:
            self._struck.append((name, place, salt))
        with suppress(OSError, StoreError):
            self.lock.acquire(0)
            try:
                self._strike()
            finally:
                self.lock.release()

    def _strike(self) -> None:
        while self._struck:
            strike_out(self.folder, *self._struck.pop())

    # --- writing ---------------------------------------------------------------------------------------------------

    def append(self, records: Sequence[Encoded]) -> int:
        """Write and publish records, oldest first, in sequential writes; returns the bytes written.

        Records too large for the shard raise StoreError before anything is written; StoreBusy and OSError leave the
        shard as it was (a record is published completely or not at all).
        """
        limit = self.capacity - 2 * BLOCK
        for r in records:
            if r.size > limit:
                raise StoreError(f"a record of {r.size} bytes cannot fit a shard of {self.capacity} bytes")
        stale = self.lock.acquire()
        try:
            self._recover(stale)
            with suppress(OSError, StoreError):
                self._strike()
            written = 0
            todo = [(r, KEPT if self._ghosts.pop(r.name, self) is None else YOUNG) for r in records]
            for log in (YOUNG, KEPT):
                written += self._append([r for r, where in todo if where == log], log)
            self.stats.appended += len(records)
            self.stats.bytes_appended += written
            return written
        finally:
            self.lock.release()

    def _recover(self, stale: bool) -> None:
        """Cut off a dead writer's unpublished data; replace a damaged head."""
        self.index.refresh()
        intact = self.index.head.epoch > 0
        if not intact and self.index.segments:
            head = self.index.head
            seq = max((p.seq for p in self.index.places.values()), default=head.seq)
            self._publish(ShardHead(1, seq, head.last))
        removed = False
        for segment, size in self.folder.listing().items():
            known = segment in self.index.segments
            if segment > self.index.head.last:
                left_over = self.folder.wrote(segment)
            else:  # its first block is damaged: its records are unreadable
                left_over = not known and segment in self.index.unread and self.folder.wrote(segment)
            if left_over:
                self.folder.remove(segment)
                removed = True
            elif known and size > self.index.head.published(segment, size):
                self._cut(segment, self.index.head.published(segment, size))
                removed = True
        self.stats.recovered += bool(stale and removed)

    def _cut(self, segment: int, length: int) -> None:
        fd = self.folder.folder.open(self.folder.file(segment), write=True)
        try:
            self.files.truncate(fd, length)
        finally:
            self.files.close(fd)

    def _publish(self, head) -> None:
        self.folder.publish(head)
        self.index.published(head)

    def _append(self, records: Sequence[Encoded], log: int, hits: dict[bytes, int] | None = None) -> int:
        written, rest = 0, list(records)
        while rest:
            batch = [rest.pop(0)]
            size = batch[0].size
            while rest and BLOCK + size + rest[0].size <= self.segment_bytes:
                batch.append(rest.pop(0))
                size += batch[-1].size
            self._make_room(size + BLOCK)  # first, since making room may append to this log too
            number, length = self._open_segment(log, size)
            self._write(number, log, length, batch, size, hits or {})
            written += size
        return written

    def _write(self, number: int, log: int, length: int, batch: list[Encoded], size: int, hits: dict) -> None:
        head, segment = self.index.head, self.index.segments[number]
        buffer = aligned_buffer(size)
        placed, at, seq = [], 0, head.seq
        for r in batch:
            seq += 1
            placed.append((r.write_into(buffer[at : at + r.size], seq, segment.salt, length + at), length + at))
            at += r.size
        fd = self.folder.folder.open(self.folder.file(number), write=True, direct=self.direct)
        try:
            try:
                self.files.write(fd, buffer, length)
                if self.durable:
                    self.files.sync(fd)
            except OSError:
                self._cut(number, length)
                raise
        finally:
            self.files.close(fd)
        self._publish(head.grown(log, length + size, seq))
        segment.size = segment.scanned = length + size
        for preamble, offset in placed:
            self.index.add(number, preamble, offset, hits.get(preamble.name, 0))

    def _open_segment(self, log: int, size: int) -> tuple[int, int]:
        """Segment and published length for appending `size` bytes."""
        number, length = self.index.head.open[log]
        if number in self.index.segments and (length == BLOCK or length + size <= self.segment_bytes):
            return number, length
        salt = os.urandom(16)
        number = self._create(salt, log)
        self._publish(self.index.head.opened(log, number))
        self.index.segments[number] = Segment(salt, log)
        return number, BLOCK

    def _create(self, salt: bytes, log: int) -> int:
        """Create a segment with the next free number."""
        number = self.index.head.last
        for _ in range(_TRIES):
            number = number + 1 if number < MOST_NUMBER else 1
            if number not in self.index.segments and self.folder.create(number, salt, log):
                return number
        raise StoreError(f"{self.path} has no free name for a segment")

    # --- making room -----------------------------------------------------------------------------------------------

    def _make_room(self, size: int) -> None:
        while self.index.nbytes + size > self.capacity:
            self._empty(self._victim())

    def _victim(self) -> int:
        """The oldest segment of the log to be emptied."""
        logs = {log: [i for i, s in self.index.segments.items() if s.log == log] for log in (YOUNG, KEPT)}
        young = sum(self.index.segments[i].size for i in logs[YOUNG])
        from_young = logs[YOUNG] and (not logs[KEPT] or young > self._young_limit)
        chosen = logs[YOUNG] if from_young else logs[KEPT]
        if not chosen:
            raise StoreError(f"no segment of {self.path} can be removed to make room")
        return min(chosen)

    @property
    def _young_limit(self) -> int:
        return max(self.segment_bytes, int(_YOUNG_SHARE * self.capacity))

    def compact(self, keep: Callable[[bytes], bool]) -> int:
        """Rewrite every segment with damaged, superseded or unwanted records; returns the bytes freed.

        `keep` returns whether a name (namespace and key) stays. StoreBusy and OSError leave a sound shard.
        """
        stale = self.lock.acquire()
        try:
            self._recover(stale)
            before = self.index.nbytes
            for number in list(self.index.segments):
                log, size = self.index.segments[number].log, self.index.segments[number].size
                sound, hits = self._survivors(number, keep)
                if BLOCK + sum(r.size for r in sound) < size:
                    self._remove(number)
                    self._append(sound, log, hits)
            self._make_room(0)
            return before - self.index.nbytes
        finally:
            self.lock.release()

    def _survivors(self, number: int, keep: Callable[[bytes], bool]) -> tuple[list[Encoded], dict[bytes, int]]:
        """The sound records of a segment that are kept, and their hits."""
        sound, hits = [], {}
        for name, place in self.index.live(number):
            if keep(name):
                try:
                    salt = self.index.segments[number].salt
                    head, payload = read_placed(self.folder, name, place, salt, None, host_buffer, anything)
                except (Damaged, Foreign, FileNotFoundError):
                    self.stats.damaged += 1
                    continue
                sound.append(Encoded.of_head(name, head, payload))
                hits[name] = place.hits
        return sound, hits

    def _remove(self, number: int) -> None:
        self.index.forget(number)
        self.folder.remove(number)
        self._publish(replace(self.index.head, epoch=self.index.head.epoch + 1))

    def _empty(self, number: int) -> None:
        """Remove a segment; records read since they were written move to the kept log."""
        log, places = self.index.segments[number].log, self.index.places
        unread = [n for n, p in self.index.live(number) if p.hits == 0]
        for name in unread:
            self._ghost(name)
        self.stats.evicted += len(unread)
        stay, hits = self._survivors(number, lambda name: places[name].hits > 0)
        self._remove(number)
        if stay:
            hits = {name: n - 1 if log == KEPT else 0 for name, n in hits.items()}
            self.stats.bytes_moved += self._append(stay, KEPT, hits)

    def _ghost(self, name: bytes) -> None:
        self._ghosts[name] = None
        while len(self._ghosts) > max(1024, 2 * len(self.index.places)):
            self._ghosts.popitem(last=False)
