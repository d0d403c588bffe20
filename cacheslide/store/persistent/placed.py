"""Reading and checking a record at a known place in a segment, or striking it out so that it hides no sound one."""

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cacheslide.store.files import tensor_view
from cacheslide.store.persistent.index import Location
from cacheslide.store.persistent.record import (
    CUT_OFF,
    NOBODY,
    PREAMBLE_BYTES,
    Accept,
    Damaged,
    Head,
    Misfit,
    Preamble,
    decode_head,
)
from cacheslide.store.persistent.segments import SegmentFolder

Runs = Sequence[tuple[int, int]]
Buffer = Callable[[int], Tensor]


def read_placed(
    segments: SegmentFolder,
    name: bytes,
    place: Location,
    salt: bytes,
    runs: Runs | None,
    buffer: Buffer,
    accept: Accept,
) -> tuple[Head, Tensor]:
    """Head and pages of a record, all or those of `runs`; verified, and accepted before the pages are read.

    Damaged if it is not the record (Misfit if not accepted), FileNotFoundError if its segment is gone.
    """

    if place.size > accept.most:
        raise Misfit(f"a record of {place.size} bytes, of at most {accept.most}")

    def decoded(raw: memoryview) -> Head:
        head = decode_head(raw, name, salt, place.offset)
        accept(head)
        return head

    if runs is None:
        heads = []

        def room(raw: memoryview) -> Tensor:
            heads.append(decoded(raw))
            return buffer(place.size - place.payload_at)

        memory, read = segments.read_record(place.segment, place.offset, place.payload_at, room)
        [head] = heads
        if read < head.layout.payload_bytes:
            raise Damaged(CUT_OFF)
        payload = memory[: head.layout.payload_bytes]
        head.check(payload.numpy(), 0, head.layout.pages)
        return head, payload
    head = decoded(segments.read(place.segment, place.offset, place.payload_at))
    bounds, parts = head.layout.bounds, []
    for first, last in runs:
        if not 0 <= first < last <= head.layout.pages:
            raise Damaged(f"it has {head.layout.pages} pages, {first} to {last} were asked for")
        length = bounds[last] - bounds[first]
        raw = segments.read(place.segment, place.offset + place.payload_at + bounds[first], length)
        if len(raw) != length:
            raise Damaged(CUT_OFF)
        parts.append(tensor_view(raw))
        head.check(parts[-1].numpy(), first, last)
    return head, parts[0] if len(parts) == 1 else torch.cat([torch.empty(0, dtype=torch.uint8), *parts])


def strike_out(segments: SegmentFolder, name: bytes, place: Location, salt: bytes) -> None:
    """Replace a record's name by `NOBODY`, if it is still in its place. Call with the shard's lock held."""
    fd = segments.folder.open(segments.file(place.segment), write=True)
    try:
        preamble = Preamble.unpack(os.pread(fd, PREAMBLE_BYTES, place.offset), salt, place.offset)
        if preamble is not None and (preamble.name, preamble.seq) == (name, place.seq):
            segments.files.write(fd, memoryview(preamble._replace(name=NOBODY).pack(salt, place.offset)), place.offset)
    finally:
        segments.files.close(fd)
