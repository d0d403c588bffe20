"""The chunk stores: what goes in comes out, limits hold, damage is noticed."""

import pytest
import torch

from cacheslide.errors import StoreError
from cacheslide.store import ChunkKV, DirectoryChunkStore, MemoryChunkStore


def chunk(n=4, seed=0, inputs=True) -> ChunkKV:
    g = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 3, n, 2, 8, generator=g)
    held = {1: torch.randn(n, 16, generator=g)} if inputs else {}
    return ChunkKV(k, v, torch.arange(n) + 5, held, generation=2)


@pytest.fixture(params=["memory", "directory"])
def store(request, tmp_path):
    return MemoryChunkStore() if request.param == "memory" else DirectoryChunkStore(tmp_path / "s")


def test_round_trip(store):
    assert store.get("ab") is None and not store.contains("ab")
    store.put("ab", chunk())
    got, want = store.get("ab"), chunk()
    for name in ("k", "v", "positions"):
        assert torch.equal(getattr(got, name), getattr(want, name))
    assert torch.equal(got.layer_inputs[1], want.layer_inputs[1])
    assert (got.generation, len(store)) == (2, 1)
    assert store.nbytes >= want.nbytes
    assert (store.stats.hits, store.stats.misses, store.stats.bytes_read) == (1, 1, want.nbytes)


def test_bfloat16_survives(store):
    store.put("ab", chunk().to(torch.bfloat16))
    assert torch.equal(store.get("ab").k, chunk().k.to(torch.bfloat16))


def test_memory_evicts_the_least_recently_used():
    size = chunk().nbytes
    store = MemoryChunkStore(capacity=2 * size + 1)
    store.put("a", chunk())
    store.put("b", chunk())
    store.get("a")
    store.put("c", chunk())
    assert [store.contains(k) for k in "abc"] == [True, False, True]
    assert store.nbytes == 2 * size and store.stats.evictions == 1
    with pytest.raises(StoreError, match="cannot fit"):
        MemoryChunkStore(capacity=size - 1).put("a", chunk())
    with pytest.raises(StoreError, match="capacity"):
        MemoryChunkStore(capacity=-1)


@pytest.mark.parametrize("key", ["", "../x", "AB", "a/b"])
def test_keys_cannot_leave_the_folder(tmp_path, key):
    with pytest.raises(StoreError, match="malformed"):
        DirectoryChunkStore(tmp_path).put(key, chunk())


def test_a_damaged_file_is_named_not_served(tmp_path):
    store = DirectoryChunkStore(tmp_path)
    store.put("ab", chunk())
    file = tmp_path / "ab.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    assert "ab.safetensors cannot be read" in store.fetch("ab").why and store.get("ab") is None
    store.put("ab", chunk())  # it was the store's: gone, so that the chunk can be kept again
    assert torch.equal(store.get("ab").k, chunk().k)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cacheslide.store.directory.save", full)
    store = DirectoryChunkStore(tmp_path)
    with pytest.raises(StoreError, match="No space left"):
        store.put("ab", chunk())
    assert list(tmp_path.iterdir()) == []


def test_inconsistent_chunks_are_refused():
    with pytest.raises(StoreError, match="shapes"):
        ChunkKV(chunk().k, chunk().v, torch.arange(3))
    with pytest.raises(StoreError, match="layer inputs"):
        ChunkKV(chunk().k, chunk().v, torch.arange(4), {0: torch.zeros(3, 16)})
