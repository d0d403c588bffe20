"""The files of a shard: segments of records, and the head that says how far they are published.

A segment starts with one block of JSON (format, salt, which log it belongs to) and is appended to; sealed segments
never change. The head is 64 checksummed bytes: the open segment of each log and its published length. Data reaches
the disk before the head names it, so what the head names is whole; whatever lies behind it was never published.
"""

import json
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash
from torch import Tensor

from cacheslide.errors import StoreError
from cacheslide.store.files import BLOCK, Files, aligned_buffer
from cacheslide.store.record import FORMAT

HEAD = struct.Struct("<8sIIQQQQQ")  # magic, format, -, epoch, next seq, last segment, then the two logs' packed state
_MAGIC = b"CSLDHEAD"
YOUNG, KEPT = 0, 1
_LENGTH_BITS = 34  # segments are below 16 GiB: id and length share 64 bits


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
        """None when the bytes are no intact head."""
        if len(raw) != HEAD.size + 8 or raw[-8:] != struct.pack("<Q", xxhash.xxh3_64_intdigest(raw[:-8])):
            return None
        magic, version, _, epoch, seq, last, young, kept = HEAD.unpack(raw[:-8])
        if magic != _MAGIC:
            return None
        if version != FORMAT:
            raise StoreError(f"the store has format {version}, this version reads {FORMAT}: use another folder")
        split = tuple((x >> _LENGTH_BITS, x & (1 << _LENGTH_BITS) - 1) for x in (young, kept))
        return cls(epoch, seq, last, split)

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

    def __init__(self, path: Path, files: Files, direct: bool) -> None:
        self.path, self.files, self.direct = path, files, direct
        self.head_path = path / "head"

    def file(self, segment: int) -> Path:
        """Path of segment number `segment`."""
        return self.path / f"seg-{segment:010d}.log"

    def listing(self) -> dict[int, int]:
        """Segment numbers and file sizes, ascending."""
        out = {}
        with os.scandir(self.path) as entries:
            for e in entries:
                if e.name.startswith("seg-") and e.name.endswith(".log") and e.name[4:-4].isdigit():
                    try:
                        out[int(e.name[4:-4])] = e.stat(follow_symlinks=False).st_size
                    except FileNotFoundError:  # removed by another process in between
                        continue
        return dict(sorted(out.items()))

    def raw_head(self) -> bytes:
        """The head file's bytes; empty when there is none."""
        try:
            with open(self.head_path, "rb") as f:
                return f.read()
        except FileNotFoundError:
            return b""

    def publish(self, head: ShardHead) -> None:
        """Replace the head's bytes in place: 64 bytes in one block, so readers see the old or the new."""
        fd = self.files.open(self.head_path, create=True, write=True)
        try:
            self.files.write(fd, memoryview(head.pack()), 0)
        finally:
            self.files.close(fd)

    def create(self, segment: int, salt: bytes, log: int) -> None:
        """A new segment with its first block; left-overs of a process that died while creating it are replaced."""
        path = self.file(segment)
        self.files.unlink(path)
        fd = self.files.open(path, new=True, write=True)
        try:
            block = aligned_buffer(BLOCK)
            text = json.dumps({"format": FORMAT, "kind": "cacheslide-segment", "salt": salt.hex(), "log": log}).encode()
            block[: len(text)] = text
            self.files.write(fd, block, 0)
            self.files.sync(fd)
        finally:
            self.files.close(fd)
        self.files.sync_folder(self.path)

    def read(self, segment: int, offset: int, length: int) -> memoryview:
        """`length` bytes from `offset` (fewer at the end of the file), through whole blocks; OSError on failure."""
        start = offset // BLOCK * BLOCK
        buffer = aligned_buffer(offset + length - start)
        whole = memoryview(buffer.obj)
        fd = self.files.open(self.file(segment), direct=self.direct)
        try:
            n = self.files.read(fd, whole, start)
        finally:
            self.files.close(fd)
        return whole[offset - start : max(offset - start, min(n, offset - start + length))]

    def read_record(self, segment: int, offset: int, head_bytes: int, payload: Tensor) -> tuple[memoryview, int]:
        """A record's first `head_bytes` bytes, and how many came of its payload, which is read into uint8 `payload`.

        Both start and end at whole blocks. Fewer bytes come at the end of the file; OSError on failure.
        """
        head, pages = aligned_buffer(head_bytes), memoryview(payload.numpy())
        fd = self.files.open(self.file(segment), direct=self.direct)
        try:
            if (n := self.files.read(fd, head, offset)) < head_bytes:
                return head[:n], 0
            return head, self.files.read(fd, pages, offset + head_bytes)
        finally:
            self.files.close(fd)

    def kind(self, segment: int) -> tuple[bytes, int] | None:
        """Salt and log of a segment, None when its first block is damaged."""
        try:
            first = json.loads(bytes(self.read(segment, 0, BLOCK)).rstrip(b"\0"))
            if first["kind"] != "cacheslide-segment":
                return None
            if first["format"] != FORMAT:
                raise StoreError(f"{self.file(segment).name} has format {first['format']}, this version reads {FORMAT}")
            return bytes.fromhex(first["salt"]), int(first["log"])
        except (ValueError, KeyError, TypeError):
            return None
