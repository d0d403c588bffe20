"""Records whose checksums are right and whose headers lie."""

import json
import struct
from dataclasses import replace

import torch

from cacheslide.store.config import StoreConfig, open_store
from cacheslide.store.persistent.record import Encoded
from cacheslide.store.persistent.shape import ChunkShape
from tests.helpers.chunks import chunk, encoded

ROW = 2 * 2 * 8 * 4
SHAPE = ChunkShape(layers=3, kv_heads=2, head_dim=8, dtype="float32", hidden=24, max_positions=4096)
OTHERS = {
    "layers": chunk(1, layers=2),
    "layers too many": chunk(1, layers=4),
    "heads": chunk(1, heads=1),
    "head size": chunk(1, dim=4),
    "heads swapped with head size": chunk(1, heads=8, dim=2),
    "half the bytes": chunk(1, dtype=torch.float16),
    "as many bytes": chunk(1, dim=16, dtype=torch.bfloat16),
    "tokens": chunk(1, n=1),
    "tokens too many": chunk(1, n=41),
    "positions below 0": replace(chunk(1), positions=torch.arange(40) - 1),
    "positions beyond the model's": replace(chunk(1), positions=torch.arange(40) + 4096),
    "positions that overflow": replace(chunk(1), positions=torch.full((40,), -(2**63))),
    "generation": replace(chunk(1), generation=5),
    "an input of a layer that is none": replace(chunk(1), layer_inputs={3: torch.ones(40, 24)}),
    "inputs of another width": replace(chunk(1), layer_inputs={1: torch.ones(40, 12)}),
}


def opened(path, **kw):
    config = {"path": str(path), "host_gib": 1e-4, "file_gib": 0.02, "spill_gib": 0.0, "shards": 2, "segment_mib": 1}
    return open_store(StoreConfig.from_dict(config | kw), ROW, shape=SHAPE)


def with_header(record: Encoded, header: bytes, size: int | None = None) -> Encoded:
    """The same with another JSON header, its checksums right."""
    length = int.from_bytes(record.head[:8], "little")
    head = struct.pack("<Q", len(header) if size is None else size) + header + record.head[8 + length :]
    return replace(record, head=head)


def header_of(record: Encoded) -> dict:
    return json.loads(record.head[8 : 8 + int.from_bytes(record.head[:8], "little")])


def said(**changes) -> bytes:
    found = header_of(encoded(1))
    return json.dumps(found | {"layout": found["layout"] | changes}).encode()


HEADERS = {
    "not JSON": b"{{{{",
    "a list": b"[]",
    "nested": b"[" * 60_000,
    "nested objects": b'{"layout":' * 6_000,
    "too long": b" " * 70_000 + said(),
    "no layout": b'{"generation":0}',
    "Infinity": said().replace(b'"generation": 1', b'"generation": Infinity'),
    "NaN": said().replace(b'"generation": 1', b'"generation": NaN'),
    "a key twice": said().replace(b'"generation": 1', b'"generation": 9, "generation": 1'),
    "a number of 5,000 digits": said().replace(b'"generation": 1', b'"generation": 1' + b"0" * 5000),
    "generation below 0": said().replace(b'"generation": 1', b'"generation": -1'),
    "generation true": said().replace(b'"generation": 1', b'"generation": true'),
    "not UTF-8": b"\xff\xfe" + said(),
    "surrogates": said(dtype="\ud800"),
    "tokens below 0": said(tokens=-1),
    "tokens text": said(tokens="40"),
    "tokens a fraction": said(tokens=40.0),
    "tokens 10^12": said(tokens=10**12),
    "layers 0": said(layers=0),
    "inputs a number": said(inputs=1),
    "inputs twice": said(inputs=[1, 1]),
    "inputs nested": said(inputs=[[1]]),
    "inputs 10^5": said(inputs=list(range(10_000)), hidden=1),
    "hidden 0": said(hidden=0),
    "another dtype": said(dtype="object"),
    "dtype a list": said(dtype=["float32"]),
    "a field more": said(more=1),
    "whole a number": json.dumps(header_of(encoded(1)) | {"whole": 5}).encode(),
    "whole a list": json.dumps(header_of(encoded(1)) | {"whole": []}).encode(),
}
