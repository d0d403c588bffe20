"""Index of each chunk's newest record, built from the segments and updated with other processes' writes."""

import errno
import os
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import wraps

from cacheslide.store.files import BLOCK
from cacheslide.store.folder import Foreign
from cacheslide.store.persistent.record import NOBODY, PREAMBLE_BYTES, Preamble
from cacheslide.store.persistent.segments import SegmentFolder, ShardHead

_STRIDE = 1 << 20  # bytes per read when preambles are searched block by block
REFRESH_S = 1.0  # maximum time that a look-up spends on new records; the next one continues


def _guarded(method):
    """Decorator: run a method under the index's lock."""

    @wraps(method)
    def locked(self, *args, **kwargs):
        with self._guard:
            return method(self, *args, **kwargs)

    return locked


class Location:
    """Place of a record: segment, offset, size in bytes; `hits` counts reads since it was written (at most 3)."""

    __slots__ = ("hits", "offset", "payload_at", "segment", "seq", "size")

    def __init__(self, segment: int, offset: int, size: int, payload_at: int, seq: int, hits: int = 0) -> None:
        self.segment, self.offset, self.size = segment, offset, size
        self.payload_at, self.seq, self.hits = payload_at, seq, hits


@dataclass
class Segment:
    """Index state of one segment: its salt and log, bytes scanned, file size, and record names."""

    salt: bytes
    log: int
    scanned: int = BLOCK
    size: int = BLOCK
    names: list[bytes] = field(default_factory=list)


class ShardIndex:
    """Maps names (namespace and key, 36 bytes) to locations. Thread-safe."""

    def __init__(self, folder: SegmentFolder) -> None:
        self.folder = folder
        self.head = ShardHead()
        self.places: dict[bytes, Location] = {}
        self.segments: OrderedDict[int, Segment] = OrderedDict()
        self.skipped = 0  # damaged stretches found while scanning
        self.unread: dict[int, int] = {}  # files named like segments that are not segments, with their sizes
        self._until = 0.0
        self._raw = b"?"
        self._guard = threading.RLock()

    def find(self, name: bytes) -> Location | None:
        """The place of a record; reads other processes' writes if it is unknown."""
        place = self.places.get(name)
        if place is None and self.refresh():
            place = self.places.get(name)
        return place

    def salt(self, place: Location) -> bytes | None:
        """The salt of a location's segment; None if the segment no longer exists."""
        segment = self.segments.get(place.segment)
        return None if segment is None else segment.salt

    def published(self, head: ShardHead) -> None:
        """Set the head that this process has just written."""
        with self._guard:
            self.head, self._raw = head, head.pack()

    @_guarded
    def refresh(self, force: bool = False, limit_s: float = REFRESH_S) -> bool:
        """Index records published since the last call; a single small read if there are none. Returns whether any were.

        After `limit_s` seconds the rest is left to the next call. StoreError or OSError if the folder cannot be used.
        """
        raw = self.folder.raw_head()
        if raw == self._raw and not force:
            return False
        self._until = time.monotonic() + limit_s
        head, listing = ShardHead.unpack(raw), self.folder.listing()
        if head is None:  # no store yet, or a damaged head: segments are read to their ends
            head = ShardHead(seq=self.head.seq, last=max(listing, default=0))
        self.head, self._raw = head, raw
        for gone in [i for i in self.segments if i not in listing]:
            self.forget(gone)
        self.unread = {i: size for i, size in self.unread.items() if i in listing}
        for segment, size in listing.items():
            if segment <= head.last:
                if time.monotonic() >= self._until:
                    self._raw = b"?"
                    break
                self._take(segment, size, head.published(segment, size))
        return True

    def _take(self, segment: int, size: int, published: int) -> None:
        known = self.segments.get(segment)
        if known is None:
            if self.unread.get(segment) == size:
                return
            try:
                kind = self.folder.kind(segment)
            except FileNotFoundError:
                return
            if kind is None:
                self.skipped += segment not in self.unread
                self.unread[segment] = size
                return
            self.unread.pop(segment, None)
            known = self.segments[segment] = Segment(*kind)
        known.size = max(known.size, published)
        if published > known.scanned:
            self._scan(segment, known, published)

    def _scan(self, number: int, segment: Segment, end: int) -> None:
        """Read the preambles in [scanned, end); after a damaged one, search for the next block with a valid one."""
        try:
            fd = self.folder.folder.open(self.folder.file(number))
        except (FileNotFoundError, Foreign):
            return
        try:
            at, window, start = segment.scanned, b"", 0
            ahead = PREAMBLE_BYTES  # many small records per read, or only the preambles of large ones
            while at + PREAMBLE_BYTES <= end:
                if at + PREAMBLE_BYTES > start + len(window):
                    window, start = os.pread(fd, ahead, at), at
                    if time.monotonic() >= self._until:
                        self._raw, segment.scanned = b"?", at
                        return
                preamble = Preamble.unpack(window[at - start : at - start + PREAMBLE_BYTES], segment.salt, at)
                size = 0 if preamble is None else preamble.size
                if preamble is None or at + size > end or preamble.seq > self._newest:
                    self.skipped += 1
                    at = self._next(fd, segment.salt, at + BLOCK, end)
                    continue
                self.add(number, preamble, at)
                at += size
                ahead = _STRIDE if size < _STRIDE // 32 else PREAMBLE_BYTES
        finally:
            os.close(fd)
        segment.scanned = end

    @property
    def _newest(self) -> int:
        """The highest valid sequence number of a published record; unlimited if the head is damaged."""
        return self.head.seq if self.head.epoch else 1 << 62

    def _next(self, fd: int, salt: bytes, at: int, end: int) -> int:
        """The next block with a preamble, or the offset at which to continue searching later."""
        while at < end and time.monotonic() < self._until:
            at = _data(fd, at)
            raw = os.pread(fd, max(0, min(_STRIDE, end - at)), at)
            for i in range(0, len(raw), BLOCK):
                if Preamble.unpack(raw[i : i + PREAMBLE_BYTES], salt, at + i) is not None:
                    return at + i
            at += max(len(raw), BLOCK)
        return min(at, end)

    @_guarded
    def add(self, segment: int, preamble: Preamble, offset: int, hits: int = 0) -> None:
        """Add a record; it supersedes an older one of the same name."""
        if preamble.name == NOBODY:
            return
        old = self.places.get(preamble.name)
        if old is not None and old.seq > preamble.seq:
            return
        place = Location(segment, offset, preamble.size, preamble.payload_at, preamble.seq, hits)
        self.places[preamble.name] = place
        self.segments[segment].names.append(preamble.name)

    @_guarded
    def drop(self, name: bytes, place: Location) -> None:
        """Remove a damaged or missing record, unless a newer one has replaced it."""
        if self.places.get(name) is place:
            del self.places[name]

    @_guarded
    def forget(self, segment: int) -> None:
        """Remove a segment and its records."""
        for name in self.segments.pop(segment).names:
            place = self.places.get(name)
            if place is not None and place.segment == segment:
                del self.places[name]

    @_guarded
    def live(self, segment: int) -> list[tuple[bytes, Location]]:
        """The records of a segment that are not superseded, in file order."""
        places = {name: self.places.get(name) for name in self.segments[segment].names}
        return [(n, p) for n, p in places.items() if p is not None and p.segment == segment]

    @property
    def nbytes(self) -> int:
        """Bytes of the shard's segment files."""
        with self._guard:
            return sum(s.size for s in self.segments.values())


def _data(fd: int, at: int) -> int:
    """The first block from `at` on outside a sparse file's holes; an offset far behind the end if there is none."""
    try:
        return max(at, os.lseek(fd, at, os.SEEK_DATA) // BLOCK * BLOCK)
    except OSError as none:
        return 1 << 62 if none.errno == errno.ENXIO else at
