"""Reads safetensors files without mapping them: truncating a mapped file kills its reader.

Supports only what chunks need: a bounded header, parsed strictly, and tensors of the chunks' dtypes.
"""

import math
import os
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cacheslide.store.files import Files, host_buffer
from cacheslide.store.strict import is_count, parse_object

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
}
_MOST_HEADER = 1 << 20  # bytes
_MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class _Place:
    """A tensor in a file: bytes [first, end) behind the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int
    end: int

    @classmethod
    def of(cls, about: Any) -> "_Place":
        if not isinstance(about, dict) or about.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError("a tensor without dtype, shape and place")
        shape, place = about["shape"], about["data_offsets"]
        lists = isinstance(shape, list) and isinstance(place, list) and len(place) == 2
        if not lists or len(shape) > _MOST_DIMENSIONS or not all(map(is_count, [*shape, *place])):
            raise ValueError("a tensor with a shape or a place that is none")
        if not isinstance(about["dtype"], str) or (dtype := _DTYPES.get(about["dtype"])) is None:
            raise ValueError("a tensor of a dtype that chunks do not have")
        if place[1] - place[0] != math.prod(shape) * dtype.itemsize:
            raise ValueError("a tensor in a place of another size")
        return cls(dtype, tuple(shape), *place)

    def of_bytes(self, room: Tensor) -> Tensor:
        part = room[self.first : self.end]
        part = part.clone() if self.first % self.dtype.itemsize else part
        return part.view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file's header: its metadata, and the places of its tensors behind the first `start` bytes."""

    metadata: dict[str, str]
    places: dict[str, _Place]
    start: int
    nbytes: int

    @classmethod
    def of(cls, fd: int) -> "TensorFile":
        """Read the header and check it against the file's size; ValueError if it is invalid."""
        size, raw = os.fstat(fd).st_size, os.pread(fd, 8, 0)
        length = int.from_bytes(raw, "little")
        if len(raw) < 8 or length > min(_MOST_HEADER, size - 8):
            raise ValueError("it does not begin with a header")
        header = parse_object(os.pread(fd, length, 8), _MOST_HEADER)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("its metadata are no text")
        places = {name: _Place.of(about) for name, about in header.items()}
        ends = [0, *(x for p in sorted(places.values(), key=lambda p: (p.first, p.end)) for x in (p.first, p.end))]
        if any(a != b for a, b in list(pairwise(ends))[::2]) or ends[-1] != size - 8 - length:
            raise ValueError("its tensors do not lie one after the other to its end")
        return cls(metadata, places, 8 + length, ends[-1])

    def read(self, fd: int, files: Files) -> dict[str, Tensor]:
        """All tensors, copied; ValueError if the file has become shorter since."""
        room = host_buffer(self.nbytes)
        if files.read(fd, memoryview(room.numpy()), self.start) != self.nbytes:
            raise ValueError("it ends before its tensors do")
        return {name: place.of_bytes(room) for name, place in self.places.items()}
