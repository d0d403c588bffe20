"""Chunks of one small shape, their records, and a file tier for them."""

import torch

from cacheslide.store import ChunkKV
from cacheslide.store.persistent.filetier import FileOptions, FileTier, chunk_name, namespace_id
from cacheslide.store.persistent.record import Encoded

MIB = 1 << 20


def chunk(seed=0, n=40, layers=3, heads=2, dim=8, inputs=(1,), dtype=torch.float32) -> ChunkKV:
    g = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, layers, n, heads, dim, generator=g).to(dtype)
    held = {i: torch.randn(n, 24, generator=g).to(dtype) for i in inputs}
    return ChunkKV(k, v, torch.arange(n) + seed, held, generation=1)


def name(i: int, namespace: str = "") -> bytes:
    return chunk_name(namespace_id(namespace), f"{i * 2654435761 % 2**160:040x}")


def encoded(i: int, **kw) -> Encoded:
    return Encoded.of(name(i), chunk(i, **kw), 16)


def tier(path, capacity=8 * MIB, **kw) -> FileTier:
    return FileTier(FileOptions(path, capacity, **({"shards": 2, "durable": False} | kw)))


def assert_same(got: ChunkKV, want: ChunkKV) -> None:
    for part in ("k", "v", "positions"):
        assert torch.equal(getattr(got, part), getattr(want, part))
    assert got.layer_inputs.keys() == want.layer_inputs.keys()
    assert all(torch.equal(got.layer_inputs[i], x) for i, x in want.layer_inputs.items())
    assert got.generation == want.generation
    assert (got.scores is None) == (want.scores is None)
    assert want.scores is None or torch.equal(got.scores, want.scores)


def segment_files(path):
    return sorted(path.rglob("seg-*.log"))
