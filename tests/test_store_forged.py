"""Records whose checksums are right and that are not this engine's: misses with a reason, and removed."""

import json
import struct
from dataclasses import replace

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheslide.store import DirectoryChunkStore, MemoryChunkStore
from cacheslide.store.config import StoreConfig, open_store
from cacheslide.store.persistent.filetier import namespace_id
from cacheslide.store.persistent.record import Damaged, Encoded, Misfit, Preamble, chunk_of, decode, to_bytes
from cacheslide.store.persistent.shape import ChunkShape, Wanted
from tests.test_store_file import assert_same, chunk, encoded, name, tier
from tests.test_store_tiers import key

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


@pytest.mark.fault("forged_record")
@pytest.mark.parametrize("kind", OTHERS)
def test_a_record_of_another_shape_is_a_miss_and_is_struck_out(tmp_path, kind):
    store = opened(tmp_path / "s")
    store.persistent.file.write([Encoded.of(name(1), OTHERS[kind], 16), encoded(2)])
    found = store.fetch(key(1), tokens=40)
    assert found.chunk is None and found.why.startswith("misfit: ") and store.stats.misfits == 1
    assert not store.contains(key(1)) and store.get(key(1)) is None
    assert_same(store.get(key(2)), chunk(2))
    again = opened(tmp_path / "s")  # the record is gone from the disk, not only from the first one's index
    assert not again.contains(key(1))
    again.put(key(1), chunk(1))
    assert again.flush(60) and again.close() and store.close()
    last = opened(tmp_path / "s")
    assert_same(last.fetch(key(1), tokens=40).chunk, chunk(1))
    last.close()


@pytest.mark.fault("forged_record")
def test_a_forged_sequence_number_hides_no_sound_record(tmp_path):
    """The newest record of a name wins: one that claims to be the newest of all must not do so."""
    store = tier(tmp_path / "s", shards=1)
    store.write([encoded(1), encoded(2)])
    shard = store.shards[0]
    place, salt = shard.index.places[name(2)], shard.index.salt(shard.index.places[name(2)])
    [file] = (tmp_path / "s").rglob("seg-*")
    raw = bytearray(file.read_bytes())
    old = Preamble.unpack(bytes(raw[place.offset : place.offset + 128]), salt, place.offset)
    forged = old._replace(name=name(1), seq=2**62 - 1, head_sum=0)
    raw[place.offset : place.offset + 128] = forged.pack(salt, place.offset)
    file.write_bytes(raw)
    again = tier(tmp_path / "s")
    assert_same(chunk_of(*again.read(name(1))), chunk(1))
    again.write([encoded(3)])
    assert_same(chunk_of(*tier(tmp_path / "s").read(name(3))), chunk(3))


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


@pytest.mark.fault("forged_record")
@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_is_none_is_damage(tmp_path, kind):
    forged = with_header(encoded(1), HEADERS[kind])
    try:  # a checksum of the whole that is none: the pages' own are asked
        assert_same(chunk_of(*decode(to_bytes(forged), name(1), bytes(16), 0)), chunk(1))
        assert kind.startswith("whole")
    except Damaged as damage:
        assert len(str(damage)) < 500 and "\n" not in str(damage)
    store = tier(tmp_path / "s")
    store.write([forged, encoded(2)])
    if not kind.startswith("whole"):
        with pytest.raises(Damaged):
            store.read(name(1))
    assert_same(chunk_of(*store.read(name(2))), chunk(2))


@pytest.mark.fault("forged_record")
@pytest.mark.parametrize("size", [2**63 + 5, 2**64 - 1, 0, 1, 10**6])
def test_a_header_whose_length_is_a_lie_is_damage(size):
    forged = with_header(encoded(1), said(), size)
    with pytest.raises(Damaged):
        decode(to_bytes(forged), name(1), bytes(16), 0)


@pytest.mark.fault("forged_record")
@pytest.mark.parametrize(
    "lies",
    [{"payload": 2**63}, {"payload": 2**64 - 1}, {"payload": 2**34}, {"head": 2**32 - 1}, {"head": 0}, {"head": 4},
     {"seq": 2**64 - 1}, {"payload": 0}],
)  # fmt: skip
def test_sizes_that_are_lies_cost_nothing(tmp_path, lies):
    record = encoded(1)
    raw = bytearray(to_bytes(record))
    q = record.preamble(0)
    if lies.get("head") == 0:
        lies = lies | {"head_sum": xxhash.xxh3_64_intdigest(b"")}
    raw[:128] = q._replace(**lies).pack(bytes(16), 0)
    with pytest.raises(Damaged):
        decode(memoryview(raw), name(1), bytes(16), 0)


@pytest.mark.fault("forged_record")
def test_what_is_asked_for_bounds_what_is_read():
    wanted = Wanted(SHAPE, 16, 16 * ROW, 4, tokens=40)
    assert encoded(1).size < wanted.most < 1 << 20
    with pytest.raises(Misfit):
        decode(to_bytes(encoded(1)), name(1), bytes(16), 0, replace(wanted, tokens=39))
    decode(to_bytes(encoded(1)), name(1), bytes(16), 0, wanted)


@pytest.mark.fault("forged_record")
@pytest.mark.parametrize("kind", [k for k in OTHERS if k != "generation"])
def test_a_chunk_file_and_a_chunk_in_memory_of_another_shape_are_misses(tmp_path, kind):
    for store in (DirectoryChunkStore(tmp_path), MemoryChunkStore()):
        store.put("ab", OTHERS[kind])
        found = store.fetch("ab", shape=SHAPE, tokens=40)
        assert found.chunk is None and found.why
    store = DirectoryChunkStore(tmp_path)
    assert not store.contains("ab")  # it was the store's: it is gone, and the right one can be kept
    store.put("ab", chunk(1))
    assert_same(store.fetch("ab", shape=SHAPE, tokens=40).chunk, chunk(1))


RECORD = bytes(to_bytes(encoded(1)))


def sound_or_damaged(raw: bytes) -> None:
    """The chunk that was written, or Damaged; nothing else may come of it."""
    try:
        found = decode(memoryview(bytearray(raw)), name(1), bytes(16), 0, Wanted(SHAPE, 16, 16 * ROW, 4, tokens=40))
    except Damaged:
        return
    assert_same(chunk_of(*found), chunk(1))


@pytest.mark.fault("forged_record")
@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=9000))
def test_random_bytes_are_no_record(raw):
    sound_or_damaged(raw)
    sound_or_damaged(RECORD[:128] + raw)


@pytest.mark.fault("forged_record")
@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(RECORD) - 1), st.binary(min_size=1, max_size=9)), max_size=4),
       st.integers(0, len(RECORD)))  # fmt: skip
def test_a_mutated_record_is_what_was_written_or_damage(changes, end):
    raw = bytearray(RECORD)
    for at, new in changes:
        raw[at : at + len(new)] = new
    sound_or_damaged(bytes(raw))
    sound_or_damaged(bytes(raw[:end]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = sorted(header_of(encoded(1))["layout"])


@pytest.mark.fault("forged_record")
@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*FIELDS, "generation", "whole", "layout"]), JSON, min_size=1, max_size=3))
def test_a_random_header_with_right_checksums_is_what_was_written_or_damage(changes):
    found = header_of(encoded(1))
    layout = found["layout"] | {k: v for k, v in changes.items() if k in FIELDS}
    header = found | {"layout": layout} | {k: v for k, v in changes.items() if k not in FIELDS}
    forged = with_header(encoded(1), json.dumps(header).encode("utf-8", "replace"))
    try:
        head, _ = decode(to_bytes(forged), name(1), bytes(16), 0, Wanted(SHAPE, 16, 16 * ROW, 4, tokens=40))
    except Damaged:
        return
    assert head.layout.as_dict() == header_of(encoded(1))["layout"] | {"inputs": head.layout.inputs}


@pytest.mark.fault("tenant_key")
@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.text("ab\0 rank0of2", max_size=24), st.integers(1, 3), st.integers(0, 2)), min_size=2,
                max_size=6, unique=True))  # fmt: skip
def test_no_two_tenants_and_ranks_share_an_id(asked):
    asked = list({(n, ranks, min(rank, ranks - 1)) for n, ranks, rank in asked})
    assert len({namespace_id(n, rank, ranks) for n, ranks, rank in asked}) == len(asked)


@pytest.mark.fault("tenant_key")
def test_a_namespace_does_not_imitate_another_ones_rank_and_old_ids_stay():
    assert namespace_id("a\0rank 0 of 2") != namespace_id("a", 0, 2)
    assert (
        namespace_id("tenant-a").hex() == "4200263815bfe8f84ecc602336788db0"
        and namespace_id("tenant-a", 1, 4).hex() == "0defc418f54f2a79cff27e4cbf3b1b02"
    )
    assert len(namespace_id("\ud800")) == 16
