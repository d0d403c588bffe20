"""The on-disk record: one chunk, checksummed and bound to its key. Little-endian.

    preamble   128 bytes: magic, version, sizes, sequence number, shard salt, namespace, key, checksums
    header     JSON: page layout, generation, XXH3-64 of the whole payload
    checksums  one XXH3-64 a page, and one of the positions
    positions  int64 a token
    scores     float32 a token, in a record of version 2
    padding    to a block
    payload    the pages, in order
    padding    to a block

Version 2 is written for chunks with scores, version 1 for all others; both are otherwise equal, and code that knows
only version 1 skips records of version 2. The head's checksum covers the scores. Scores that are not finite or below 0
count as damage.

Reading single pages checks their checksums. Reading all uses the payload's checksum: one call per page would take the
GIL so often that threads which launch kernels would wait. Older records lack the payload's checksum.

The preamble's checksum covers its place in the file, so that neither a copy of a record elsewhere nor page bytes that
look like one are accepted. The salt is the shard's.

Checksums detect damage; they do not authenticate the writer. All sizes in a record are therefore bounded before
anything is allocated, its header is parsed strictly, and an `Accept` compares it with the engine's own shape before its
pages are used.
"""

import json
import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from cacheslide.errors import StoreError
from cacheslide.store.base import ChunkKV, bad_scores
from cacheslide.store.files import align, aligned_buffer, tensor_view
from cacheslide.store.pages import MOST_BYTES, MOST_PAGES, MOST_TOKENS, PageLayout, from_payload, to_payload
from cacheslide.store.strict import is_count, parse_object

MAGIC, FORMAT, SCORED = b"CSLDPAGE", 1, 2  # version of a record without scores, and with scores
_PREAMBLE = struct.Struct(
    "<8sIIQQ16s16s20sIQQ"
)  # magic, format, head bytes, payload bytes, seq, salt, ns, key, -, sums
PREAMBLE_BYTES = 128
_SUM = struct.Struct("<Q")
CUT_OFF = "the record ends before its pages do"
NOBODY = bytes(36)  # name of a struck-out record
_HEADER_BYTES = 1 << 16  # maximum bytes of JSON
MOST_BYTES_BESIDE = 1 << 18  # of a record, besides parts that grow with pages and tokens: JSON and padding
_MOST_HEAD = 8 + _HEADER_BYTES + 8 * (MOST_PAGES + 1) + (8 + 4) * MOST_TOKENS
_MOST_COUNT = 1 << 62


class Damaged(StoreError):
    """A record differs from what was written: torn, truncated, altered, or another record."""


class Misfit(Damaged):
    """A sound record of another shape than the engine's: forged, or of another model."""


class NoRoom(StoreError):
    """A tier has no room for this record; it works otherwise."""


class Preamble(NamedTuple):
    """Head (JSON, checksums, positions, scores) and payload sizes in bytes; `name` is namespace and key, 36 bytes."""

    name: bytes
    seq: int
    head: int
    payload: int
    head_sum: int
    version: int = FORMAT

    @property
    def payload_at(self) -> int:
        """Offset of the payload in the record."""
        return align(PREAMBLE_BYTES + self.head)

    @property
    def size(self) -> int:
        """Bytes of the record with its padding."""
        return self.payload_at + align(self.payload)

    def pack(self, salt: bytes, offset: int) -> bytes:
        """The 128 bytes for a record at `offset` of its file."""
        fixed = (MAGIC, self.version, self.head, self.payload, self.seq, salt, self.name[:16], self.name[16:], 0)
        raw = _PREAMBLE.pack(*fixed, self.head_sum, offset).ljust(PREAMBLE_BYTES - 8, b"\0")
        return raw + _SUM.pack(xxhash.xxh3_64_intdigest(raw))

    @classmethod
    def unpack(cls, raw: bytes, salt: bytes, offset: int) -> "Preamble | None":
        """The preamble in `raw`; None if it is damaged, of another format, or made for another place."""
        if len(raw) < PREAMBLE_BYTES or raw[:8] != MAGIC:
            return None
        if _SUM.unpack_from(raw, PREAMBLE_BYTES - 8)[0] != xxhash.xxh3_64_intdigest(raw[: PREAMBLE_BYTES - 8]):
            return None
        _, version, head, payload, seq, own_salt, ns, key, _, head_sum, at = _PREAMBLE.unpack_from(raw)
        if version not in (FORMAT, SCORED) or own_salt != salt or at != offset:
            return None
        if head > _MOST_HEAD or payload > MOST_BYTES or seq > _MOST_COUNT:
            return None
        return cls(ns + key, seq, head, payload, head_sum, version)


@dataclass(frozen=True)
class Encoded:
    """A chunk encoded for writing, except for its place. `payload` is uint8 [bytes] on the CPU."""

    name: bytes
    layout: PageLayout
    generation: int
    head: bytes
    payload: Tensor
    version: int = FORMAT

    @classmethod
    def of(cls, name: bytes, chunk: ChunkKV, page_tokens: int) -> "Encoded":
        """Encode `chunk`: pages and checksums."""
        layout = PageLayout.of(chunk, page_tokens)
        payload = to_payload(chunk, layout).cpu()
        return cls.of_pages(name, layout, payload, chunk.positions, chunk.generation, chunk.scores)

    @classmethod
    def of_pages(
        cls,
        name: bytes,
        layout: PageLayout,
        payload: Tensor,
        positions: Tensor,
        generation: int,
        scores: Tensor | None = None,
    ) -> "Encoded":
        """Encode a chunk given as pages in order."""
        place = positions.cpu().to(torch.int64).contiguous().numpy().tobytes()
        behind = b"" if scores is None else scores.contiguous().numpy().tobytes()
        sums = [*page_sums(payload.numpy(), layout, 0, layout.pages), xxhash.xxh3_64_intdigest(place)]
        payload_sum = f"{xxhash.xxh3_64_intdigest(payload.numpy()):016x}"
        about = {"layout": layout.as_dict(), "generation": generation, "whole": payload_sum}
        header = json.dumps(about, separators=(",", ":")).encode()
        head = _SUM.pack(len(header)) + header + np.array(sums, dtype="<u8").tobytes() + place + behind
        return cls(name, layout, generation, head, payload, FORMAT if scores is None else SCORED)

    @classmethod
    def of_head(cls, name: bytes, head: "Head", payload: Tensor) -> "Encoded":
        """Encode a record that was read, to write it again."""
        return cls.of_pages(name, head.layout, payload, head.positions, head.generation, head.scores)

    def preamble(self, seq: int) -> Preamble:
        """The preamble with sequence number `seq`."""
        digest = xxhash.xxh3_64_intdigest(self.head)
        return Preamble(self.name, seq, len(self.head), len(self.payload), digest, self.version)

    @property
    def size(self) -> int:
        """Bytes of the record."""
        return self.preamble(0).size

    def write_into(self, out: memoryview, seq: int, salt: bytes, offset: int) -> Preamble:
        """Write the record to the start of `out` (zeroed), for `offset` of its file; returns its preamble."""
        preamble = self.preamble(seq)
        out[:PREAMBLE_BYTES] = preamble.pack(salt, offset)
        out[PREAMBLE_BYTES : PREAMBLE_BYTES + len(self.head)] = self.head
        out[preamble.payload_at : preamble.payload_at + len(self.payload)] = memoryview(self.payload.numpy())
        return preamble


def page_sums(payload: np.ndarray, layout: PageLayout, first: int, last: int) -> list[int]:
    """Checksums of pages [first, last); `payload` uint8 starts with page `first`."""
    bounds, raw = layout.bounds, memoryview(payload)
    base = bounds[first]
    return [xxhash.xxh3_64_intdigest(raw[bounds[i] - base : bounds[i + 1] - base]) for i in range(first, last)]


@dataclass(frozen=True)
class Head:
    """A record's verified head: everything before its pages."""

    layout: PageLayout
    generation: int
    sums: np.ndarray
    positions: Tensor
    nbytes: int
    whole: int | None = None
    scores: Tensor | None = None

    @classmethod
    def parse(cls, raw: memoryview, preamble: Preamble) -> "Head":
        """Parse the bytes behind the preamble; Damaged if they differ from what was written."""
        if len(raw) != preamble.head or xxhash.xxh3_64_intdigest(raw) != preamble.head_sum:
            raise Damaged("the header does not match its checksum")
        try:
            return cls._parse(raw, preamble)
        except Damaged:
            raise
        except (ValueError, KeyError, StoreError, struct.error) as wrong:
            raise Damaged(f"the header cannot be read ({wrong})") from None

    @classmethod
    def _parse(cls, raw: memoryview, preamble: Preamble) -> "Head":
        at = 8 + _SUM.unpack_from(raw)[0]
        header = parse_object(bytes(raw[8:at]), _HEADER_BYTES)
        layout, generation = PageLayout.from_dict(header["layout"]), header["generation"]
        if preamble.payload != layout.payload_bytes:
            raise Damaged(f"{preamble.payload} bytes of pages where the header says {layout.payload_bytes}")
        if not is_count(generation):
            raise Damaged("a generation that is no count")
        end = at + 8 * (layout.pages + 1)
        scored = preamble.version == SCORED
        if len(raw) != end + (8 + 4 * scored) * layout.tokens:
            raise Damaged("the header is not as long as its layout says")
        sums, behind = np.frombuffer(raw[at:end], dtype="<u8"), end + 8 * layout.tokens
        place = bytes(raw[end:behind])
        if xxhash.xxh3_64_intdigest(place) != int(sums[-1]):
            raise Damaged("the positions do not match their checksum")
        rows = torch.frombuffer(bytearray(place), dtype=torch.int64)
        payload_sum = None
        if "whole" in header:
            payload_sum = int(header["whole"], 16) if isinstance(header["whole"], str) else -1
        scores = torch.frombuffer(bytearray(raw[behind:]), dtype=torch.float32) if scored else None
        if scores is not None and (why := bad_scores(scores, layout.tokens)):
            raise Damaged(why)
        return cls(layout, generation, sums, rows, len(raw), payload_sum, scores)

    def check(self, payload: np.ndarray, first: int, last: int) -> None:
        """Raise Damaged unless `payload` holds pages [first, last) as written."""
        if (first, last) == (0, self.layout.pages) and self.whole == xxhash.xxh3_64_intdigest(payload):
            return
        got = np.array(page_sums(payload, self.layout, first, last), dtype=np.uint64)
        wrong = np.flatnonzero(got != self.sums[first:last])
        if len(wrong):
            number = first + int(wrong[0])
            raise Damaged(f"page {number} of {self.layout.pages} does not match its checksum ({len(wrong)} in all)")


class Accept:
    """Decides which records a reader can use. This base class (as in `cacheslide store verify`) accepts any sound one.

    `most` is the size in bytes of the largest usable record: larger ones are not read.
    """

    most = _MOST_HEAD + MOST_BYTES

    def __call__(self, head: Head) -> None:
        """Raise Misfit for a record that cannot be used."""


anything = Accept()


def decode_head(raw: memoryview, name: bytes, salt: bytes, offset: int) -> Head:
    """The verified head of the record at the start of `raw`; Damaged if it is not that of `name`."""
    preamble = Preamble.unpack(bytes(raw[:PREAMBLE_BYTES]), salt, offset)
    if preamble is None or preamble.name != name:
        raise Damaged("no record of this chunk stands where it should")
    return Head.parse(raw[PREAMBLE_BYTES : PREAMBLE_BYTES + preamble.head], preamble)


def decode(raw: memoryview, name: bytes, salt: bytes, offset: int, accept: Accept = anything) -> tuple[Head, Tensor]:
    """Head and payload of a complete record in memory, every checksum verified; Damaged if invalid or not accepted."""
    head = decode_head(raw, name, salt, offset)
    accept(head)
    start = align(PREAMBLE_BYTES + head.nbytes)
    body = raw[start : start + head.layout.payload_bytes]
    if len(body) != head.layout.payload_bytes:
        raise Damaged(CUT_OFF)
    payload = tensor_view(body)
    head.check(payload.numpy(), 0, head.layout.pages)
    return head, payload


def to_bytes(record: Encoded, seq: int = 0, salt: bytes = bytes(16)) -> memoryview:
    """A stand-alone record, as stored in the remote tier."""
    out = aligned_buffer(record.size)
    record.write_into(out, seq, salt, 0)
    return out


def chunk_of(head: Head, payload: Tensor) -> ChunkKV:
    """The chunk of a verified record, as views of `payload`."""
    return from_payload(payload, head.layout, head.positions, head.generation, head.scores)
