"""Remembered deviation in every tier of the store: kept bit by bit, absent in older records, never believed blindly."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cacheslide.cli import main
from cacheslide.errors import StoreError
from cacheslide.store import DirectoryChunkStore, MemoryChunkStore
from cacheslide.store.pages import PageLayout, to_payload
from cacheslide.store.persistent.record import FORMAT, SCORED, Damaged, Encoded, Preamble, chunk_of, decode, to_bytes
from tests.helpers.chunks import assert_same, chunk, name, tier
from tests.helpers.forged import opened
from tests.helpers.scored import scored
from tests.helpers.tiered import PAGES, key, store


def encoded(i: int, **kw) -> Encoded:
    return Encoded.of(name(i), scored(i, **kw), 16)


def record_of_version_1(i: int, salt: bytes = bytes(16), seq: int = 0, offset: int = 0) -> bytes:
    """The bytes of a record as they were before there were scores, laid down here without the store's own code."""
    want = chunk(i)
    layout = PageLayout.of(want, 16)
    payload = to_payload(want, layout).numpy().tobytes()
    digest = xxhash.xxh3_64_intdigest
    pages = [payload[a:b] for a, b in zip(layout.bounds, layout.bounds[1:], strict=False)]
    place = want.positions.numpy().astype("<i8").tobytes()
    about = {"layout": layout.as_dict(), "generation": want.generation, "whole": f"{digest(payload):016x}"}
    header = json.dumps(about, separators=(",", ":")).encode()
    sums = struct.pack(f"<{len(pages) + 1}Q", *map(digest, pages), digest(place))
    head = struct.pack("<Q", len(header)) + header + sums + place
    raw = struct.pack(
        "<8sIIQQ16s16s20sIQQ", b"CSLDPAGE", 1, len(head), len(payload), seq, salt, name(i)[:16], name(i)[16:], 0,
        digest(head), offset,
    )  # fmt: skip
    raw = raw.ljust(120, b"\0")
    raw += struct.pack("<Q", digest(raw)) + head
    raw = raw.ljust(-(-len(raw) // 4096) * 4096, b"\0") + payload
    return raw.ljust(-(-len(raw) // 4096) * 4096, b"\0")


def test_a_record_of_before_is_a_chunk_without_scores():
    old = record_of_version_1(1)
    assert_same(chunk_of(*decode(memoryview(bytearray(old)), name(1), bytes(16), 0)), chunk(1))
    assert bytes(to_bytes(Encoded.of(name(1), chunk(1), 16))) == old  # and what has no scores is still written as one


def test_a_folder_of_before_is_read_and_written_on(tmp_path):
    """Records of both versions in one segment; the old one's bytes stand where the old writer would have put them."""
    before = tier(tmp_path / "s", shards=1)
    before.write([Encoded.of(name(1), chunk(1), 16)])
    place = before.shards[0].index.places[name(1)]
    [file] = (tmp_path / "s").rglob("seg-*")
    old = record_of_version_1(1, before.shards[0].index.salt(place), place.seq, place.offset)
    assert file.read_bytes()[place.offset : place.offset + place.size] == old
    after = tier(tmp_path / "s")
    after.write([encoded(2)])
    for opened_again in (after, tier(tmp_path / "s")):
        assert_same(chunk_of(*opened_again.read(name(1))), chunk(1))
        assert_same(chunk_of(*opened_again.read(name(2))), scored(2))


def test_a_record_with_scores_is_of_a_version_that_says_so():
    plain, with_scores = Encoded.of(name(1), chunk(1), 16), encoded(1)
    raw = bytes(to_bytes(with_scores))
    assert (plain.version, with_scores.version) == (FORMAT, SCORED) == (1, 2)
    assert struct.unpack_from("<I", raw, 8) == (2,)  # what knows version 1 alone takes it for no record
    assert len(with_scores.head) == len(plain.head) + 4 * 40
    assert torch.equal(with_scores.payload, plain.payload)
    assert_same(chunk_of(*decode(memoryview(bytearray(raw)), name(1), bytes(16), 0)), scored(1))


@pytest.mark.parametrize(
    ("n", "inputs", "dtype"), [(1, (), torch.bfloat16), (17, (0, 2), torch.float16), (100, (), torch.float8_e4m3fn)]
)
def test_odd_shapes_come_back(n, inputs, dtype):
    want = scored(3, n=n, inputs=inputs, dtype=dtype)
    record = Encoded.of(name(3), want, 16)
    found = chunk_of(*decode(to_bytes(record), name(3), bytes(16), 0))
    assert torch.equal(found.k.float(), want.k.float()) and torch.equal(found.scores, want.scores)
    assert want.nbytes == chunk(3, n=n, inputs=inputs, dtype=dtype).nbytes + 4 * n


@pytest.mark.parametrize("write_back", ["through", "evict"])
@pytest.mark.parametrize("memory", [{"host": 3 * PAGES}, {"device": 2 * PAGES, "host": 2 * PAGES}])
def test_scores_survive_any_memory_and_a_restart(tmp_path, memory, write_back):
    s = store(tmp_path, write_back=write_back, **memory)
    for i in range(8):
        s.put(key(i), scored(i) if i % 3 else chunk(i))
    for _ in range(2):  # the second time from storage
        assert s.flush(60)
        for i in range(8):
            assert_same(s.get(key(i)), scored(i) if i % 3 else chunk(i))
    assert s.stats.hits_file > 0
    if write_back == "through":
        assert s.flush(60) and s.close()
        again = store(tmp_path, **memory)
        for i in range(8):
            found = again.fetch(key(i))
            assert found.tier == "file"
            assert_same(found.chunk, scored(i) if i % 3 else chunk(i))
            found = again.fetch(key(i))
            assert found.tier in ("device", "host")
            assert_same(found.chunk, scored(i) if i % 3 else chunk(i))


def test_an_owner_sees_its_chunk_s_scores(tmp_path):
    s = store(tmp_path, host=3 * PAGES)
    s.put(key(1), scored(1))
    rows, kv = torch.tensor([3, 20]), torch.ones(2, 2, 8)
    s.correct(key(1), "me", 1, rows, kv, kv)
    mine = s.get(key(1), owner="me")
    assert torch.equal(mine.scores, scored(1).scores) and torch.equal(mine.k[1, rows], kv) and mine.generation == 2
    assert s.flush(60) and s.close()
    cold = store(tmp_path, host=3 * PAGES)  # the owner's version is made from what the record says
    cold.correct(key(1), "me", 1, rows, kv, kv)
    assert torch.equal(cold.get(key(1), owner="me").scores, scored(1).scores)


def test_records_that_move_keep_their_scores(tmp_path):
    s = tier(tmp_path / "s", shards=1)
    s.write([encoded(i) for i in range(4)])
    shard = s.shards[0]
    shard.compact(lambda held: held != name(2))
    for again in (s, tier(tmp_path / "s")):
        assert [i for i in range(4) if again.contains(name(i))] == [0, 1, 3]
        assert_same(chunk_of(*again.read(name(3))), scored(3))


def test_memory_counts_the_bytes_of_scores():
    small = MemoryChunkStore(chunk(1).nbytes)
    with pytest.raises(StoreError, match="cannot fit"):
        small.put("a", scored(1))
    exact = MemoryChunkStore(scored(1).nbytes)
    exact.put("a", scored(1))
    assert exact.nbytes == scored(1).nbytes == chunk(1).nbytes + 160
    assert_same(exact.get("a"), scored(1))


@pytest.mark.parametrize("layers", [1, 3])
def test_a_chunk_of_many_inputs_is_not_too_large_to_be_read(tmp_path, layers):
    """What is the most that a record may have counts the scores: pages of one token have the largest head."""
    from cacheslide.store.persistent.shape import ChunkShape, Wanted

    want = scored(1, n=3000, layers=layers, heads=1, dim=1, inputs=tuple(range(layers)), dtype=torch.float32)
    layout = PageLayout.of(want, 12)
    shape = ChunkShape(layers, 1, 1, "float32", 24, 4000)
    assert Encoded.of(name(1), want, 12).size <= Wanted(shape, 12, layout.page_bytes, 3, 3000).most


# --- what is not believed --------------------------------------------------------------------------------------------


def forged(scores: bytes) -> Encoded:
    """A record of version 2 with other bytes where the scores stand, its checksums right."""
    record = encoded(1)
    return replace(record, head=record.head[: -4 * 40] + scores)


LIES = {
    "NaN": np.full(40, np.nan, "<f4").tobytes(),
    "one NaN": np.array([1.0] * 39 + [np.nan], "<f4").tobytes(),
    "infinite": np.array([np.inf] + [1.0] * 39, "<f4").tobytes(),
    "below 0": np.array([-0.5] + [1.0] * 39, "<f4").tobytes(),
    "too few": np.ones(39, "<f4").tobytes(),
    "too many": np.ones(41, "<f4").tobytes(),
    "none": b"",
    "no whole number": np.ones(40, "<f4").tobytes() + b"\0",
}


@pytest.mark.fault("forged_record")
@pytest.mark.parametrize("kind", LIES)
def test_scores_that_are_none_are_damage(tmp_path, kind):
    with pytest.raises(Damaged) as damage:
        decode(to_bytes(forged(LIES[kind])), name(1), bytes(16), 0)
    assert "\n" not in str(damage.value)
    s = opened(tmp_path / "s")
    s.persistent.file.write([forged(LIES[kind]), encoded(2)])
    found = s.fetch(key(1), tokens=40)
    assert found.chunk is None and found.why.startswith("damaged: ") and s.stats.damaged == 1
    assert_same(s.get(key(2)), scored(2))
    again = opened(tmp_path / "s")  # struck out: it can be written anew
    assert not again.contains(key(1))
    again.put(key(1), scored(1))
    assert again.flush(60) and again.close() and s.close()
    assert_same(opened(tmp_path / "s").fetch(key(1), tokens=40).chunk, scored(1))


@pytest.mark.fault("forged_record")
@pytest.mark.parametrize(("record", "version"), [("plain", SCORED), ("scored", FORMAT), ("scored", 3), ("plain", 0)])
def test_a_version_that_is_another_s_is_damage(record, version):
    made = encoded(1) if record == "scored" else Encoded.of(name(1), chunk(1), 16)
    raw = to_bytes(replace(made, version=version))
    with pytest.raises(Damaged):
        decode(raw, name(1), bytes(16), 0)
    assert (Preamble.unpack(bytes(raw[:128]), bytes(16), 0) is None) == (version not in (FORMAT, SCORED))


def test_every_flipped_byte_of_the_scores_is_found(tmp_path):
    s = tier(tmp_path / "s", shards=1, durable=False)
    s.write([encoded(1)])
    place = s.shards[0].index.places[name(1)]
    [file] = (tmp_path / "s").rglob("seg-*")
    whole, at = file.read_bytes(), place.offset + 128 + len(encoded(1).head) - 160
    assert whole[at : at + 160] == scored(1).scores.numpy().tobytes()
    for i in range(0, 160, 7):
        file.write_bytes(whole[: at + i] + bytes([whole[at + i] ^ 1]) + whole[at + i + 1 :])
        with pytest.raises(Damaged, match="checksum"):
            tier(tmp_path / "s").read(name(1))
        file.write_bytes(whole)
    assert main(["store", "verify", str(tmp_path / "s")]) == 0


# --- chunk caches of a workflow ---------------------------------------------------------------------------------------


def test_files_of_before_and_with_scores(tmp_path):
    s = DirectoryChunkStore(tmp_path)
    s.put(key(1), chunk(1))
    s.put(key(2), scored(2))
    assert_same(s.get(key(1)), chunk(1))
    assert_same(s.get(key(2)), scored(2))
    with safe_open(tmp_path / f"{key(1)}.safetensors", "pt") as file:
        assert file.metadata() == {"format": "1", "generation": "1"} and "scores" not in file.keys()  # noqa: SIM118
    with safe_open(tmp_path / f"{key(2)}.safetensors", "pt") as file:
        assert file.metadata()["format"] == "2"


@pytest.mark.fault("forged_record")
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t | {"scores": t["scores"] * torch.nan},
        lambda t: t | {"scores": t["scores"] - 20},
        lambda t: t | {"scores": t["scores"][:-1].clone()},
        lambda t: t | {"scores": t["scores"].half()},
        lambda t: {n: x for n, x in t.items() if n != "scores"},
    ],
)
def test_a_file_with_bad_scores_is_removed_and_written_anew(tmp_path, change):
    s = DirectoryChunkStore(tmp_path)
    s.put(key(2), scored(2))
    path = tmp_path / f"{key(2)}.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "2", "generation": "1"})
    found = s.fetch(key(2))
    assert found.chunk is None and "cannot be read" in found.why and not path.exists() and s.stats.damaged == 1
    s.put(key(2), scored(2))
    assert_same(s.get(key(2)), scored(2))


def test_a_file_of_before_has_no_scores(tmp_path):
    s = DirectoryChunkStore(tmp_path)
    s.put(key(2), scored(2))
    path = tmp_path / f"{key(2)}.safetensors"
    save_file(load_file(path), path, metadata={"format": "1", "generation": "1"})
    assert s.fetch(key(2)).chunk is None


# --- servers ---------------------------------------------------------------------------------------------------------


def test_a_server_keeps_scores(tmp_path):
    remote = pytest.importorskip("tests.helpers.valkey")
    if remote.SERVER is None:
        pytest.skip("neither valkey-server nor redis-server is installed")
    with remote.server(tmp_path) as port:
        s = store(tmp_path / "a", host=3 * PAGES, disk=0, remote=remote.tier(port))
        for i in (1, 2):
            s.put(key(i), scored(i))
        assert s.flush(60)
        other = remote.tier(port)
        assert_same(chunk_of(*other.read(name(1))), scored(1))
        other.write(replace(forged(LIES["NaN"]), name=name(7)))
        with pytest.raises(Damaged):
            other.read(name(7))
        assert not other.contains(name(7))
        near = store(tmp_path / "b", host=3 * PAGES, remote=remote.tier(port))
        assert near.fetch(key(2)).tier == "remote"
        assert_same(chunk_of(*near.persistent.file.read(name(2))), scored(2))  # and is kept in files from here on
        assert s.close() and near.close()
