"""The files of a shard: segments of records, and the head with their published lengths.

A segment starts with one block of JSON (format, salt, its log) and is append-only; sealed segments never change. The
head is 64 checksummed bytes: the open segment of each log and its published length. Data reaches the disk before the
head refers to it, so published data is complete; data behind the published length was never published.

Files that are not segments of this format are neither read nor counted nor removed, whatever their names.
"""

import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

import xxhash
from torch import Tensor

from cacheslide.errors import StoreError
from cacheslide.store.files import BLOCK, Files, aligned_buffer
from cacheslide.store.folder import Folder, Foreign
from cacheslide.store.persistent.record import FORMAT, PREAMBLE_BYTES, Preamble
from cacheslide.store.strict import is_count, parse_object

HEAD = struct.Struct("<8sIIQQQQQ")  # magic, format, -, epoch, next seq, last segment, then the two logs' packed state
_MAGIC = b"CSLDHEAD"
YOUNG, KEPT = 0, 1
_LENGTH_BITS = 34  # segments are below 16 GiB: id and length share 64 bits
_LARGEST = (1 << _LENGTH_BITS) - 1
MOST_NUMBER = (1 << 64 - _LENGTH_BITS) - 1
_MOST_COUNT = 1 << 62  # limit of epochs and sequence numbers, above any real count
_MOST_SEGMENTS = 1 << 16  # per shard; the newest are read
_NAME = re.compile(r"seg-([0-9]{10})\.log")
_BEGINS = b'{"format": 1, "kind": "cacheslide-segment", "salt": "'


@dataclass(frozen=True)
class ShardHead:
    """Published state. `open` holds (segment id, length) of the young and the kept log; id 0 means none."""

    epoch: int = 0
    seq: int = 0
    last: int = 0
    open: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))

    def pack(self) -> bytes:
        """64 bytes with their checksum."""
        logs = [i << _LENGTH_BITS | n for i, n in self.open]
        raw = HEAD.pack(_MAGIC, FORMAT, 0, self.epoch, self.seq, self.last, *logs)
        return raw + struct.pack("<Q", xxhash.xxh3_64_intdigest(raw))

    @classmethod
    def unpack(cls, raw: bytes) -> "ShardHead | None":
        """The head in these bytes; None if they are damaged, of another format, or impossible for a writer."""
        if len(raw) != HEAD.size + 8 or raw[-8:] != struct.pack("<Q", xxhash.xxh3_64_intdigest(raw[:-8])):
            return None
        magic, version, _, epoch, seq, last, young, kept = HEAD.unpack(raw[:-8])
        if magic != _MAGIC or version != FORMAT:
            return None
        split = tuple((x >> _LENGTH_BITS, x & _LARGEST) for x in (young, kept))
        counts = max(epoch, seq) < _MOST_COUNT and last <= MOST_NUMBER
        logs = all(i <= last and n % BLOCK == 0 and bool(i) == bool(n) for i, n in split)
        return cls(epoch, seq, last, split) if counts and logs else None

    def opened(self, log: int, segment: int) -> "ShardHead":
        """The head after segment number `segment` became the open one of `log`."""
        logs = list(self.open)
        logs[log] = (segment, BLOCK)
        return replace(self, epoch=self.epoch + 1, last=max(self.last, segment), open=tuple(logs))

    def grown(self, log: int, length: int, seq: int) -> "ShardHead":
        """The head after the open segment of `log` was published up to `length`."""
        logs = list(self.open)
        logs[log] = (logs[log][0], length)
        return replace(self, epoch=self.epoch + 1, seq=seq, open=tuple(logs))

    def published(self, segment: int, size: int) -> int:
        """Published bytes of a segment whose file has `size` bytes."""
        return min([size, *(n for i, n in self.open if i == segment)])


class SegmentFolder:
    """Names, creation and reading of segment files in one shard's folder."""

    def __init__(self, folder: Folder, files: Files, direct: bool) -> None:
        self.folder, self.files, self.direct = folder, files, direct

    @staticmethod
    def file(segment: int) -> str:
        """Name of segment number `segment`."""
        return f"seg-{segment:010d}.log"

    def listing(self) -> dict[int, int]:
        """Numbers and sizes of files named like segments with a possible size, ascending."""
        files = self.folder.entries(lambda name: _NAME.fullmatch(name) is not None)
        sizes = {int(name[4:-4]): status.st_size for name, status in files.items() if status.st_size <= _LARGEST}
        numbers = sorted(n for n in sizes if n <= MOST_NUMBER)
        return {n: sizes[n] for n in numbers[-_MOST_SEGMENTS:]}

    def raw_head(self) -> bytes:
        """The head's bytes; empty if there is none."""
        try:
            return self.folder.read("head", HEAD.size + 8)
        except (FileNotFoundError, Foreign):
            return b""

    def publish(self, head: ShardHead) -> None:
        """Overwrite the head in place: 64 bytes in one block, so readers see the old or the new head."""
        fd = self.folder.open("head", create=True, write=True)
        try:
            self.files.write(fd, memoryview(head.pack()), 0)
        finally:
            self.files.close(fd)

    def create(self, segment: int, salt: bytes, log: int) -> bool:
        """Create a segment with its first block; False if the name exists."""
        try:
            fd = self.folder.open(self.file(segment), new=True, write=True)
        except (FileExistsError, Foreign):
            return False
        try:
            block = aligned_buffer(BLOCK)
            text = json.dumps({"format": FORMAT, "kind": "cacheslide-segment", "salt": salt.hex(), "log": log}).encode()
            block[: len(text)] = text
            self.files.write(fd, block, 0)
            self.files.sync(fd)
        finally:
            self.files.close(fd)
        self.folder.sync()
        return True

    def remove(self, segment: int) -> None:
        """Remove a segment's file if it exists."""
        self.folder.unlink(self.file(segment))

    def wrote(self, segment: int) -> bool:
        """Whether a file without a readable first block is the store's: it begins like one or holds a record."""
        try:
            raw = bytes(self.read(segment, 0, BLOCK + PREAMBLE_BYTES))
        except (OSError, StoreError):
            return False
        first = raw[BLOCK:]
        salted = len(first) == PREAMBLE_BYTES and Preamble.unpack(first, first[40:56], BLOCK) is not None
        return raw.startswith(_BEGINS) or salted

    def read(self, segment: int, offset: int, length: int) -> memoryview:
        """`length` bytes from `offset` (fewer at the end of the file), read in whole blocks; OSError on failure."""
        start = offset // BLOCK * BLOCK
        buffer = aligned_buffer(offset + length - start)
        blocks = memoryview(buffer.obj)
        fd = self.folder.open(self.file(segment), direct=self.direct)
        try:
            n = self.files.read(fd, blocks, start)
        finally:
            self.files.close(fd)
        return blocks[offset - start : max(offset - start, min(n, offset - start + length))]

    def read_record(
        self, segment: int, offset: int, head_bytes: int, room: Callable[[memoryview], Tensor]
    ) -> tuple[Tensor, int]:
        """Read a record's first `head_bytes` bytes, then its payload into the uint8 tensor returned by `room`.

        Both start and end at block boundaries. Returns the payload's memory and the number of bytes read into it, fewer
        at the end of the file; OSError on failure, and any exception of `room`.
        """
        head = aligned_buffer(head_bytes)
        fd = self.folder.open(self.file(segment), direct=self.direct)
        try:
            payload = room(head[: self.files.read(fd, head, offset)])
            return payload, self.files.read(fd, memoryview(payload.numpy()), offset + head_bytes)
        finally:
            self.files.close(fd)

    def kind(self, segment: int) -> tuple[bytes, int] | None:
        """Salt and log of a segment; None if its first block is invalid."""
        try:
            first = parse_object(bytes(self.read(segment, 0, BLOCK)).rstrip(b"\0"), BLOCK)
            if first["kind"] != "cacheslide-segment" or first["format"] != FORMAT:
                return None
            salt = bytes.fromhex(first["salt"])
            return (salt, first["log"]) if len(salt) == 16 and is_count(first["log"], YOUNG, KEPT) else None
        except FileNotFoundError:
            raise
        except (OSError, Foreign, ValueError, KeyError, TypeError):
            return None
