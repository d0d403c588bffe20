"""Records whose checksums are right and that are not this engine's: misses with a reason, and removed."""

import json
from dataclasses import replace

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheslide.store import DirectoryChunkStore, MemoryChunkStore
from cacheslide.store.persistent.filetier import namespace_id
from cacheslide.store.persistent.record import Damaged, Encoded, Misfit, Preamble, chunk_of, decode, to_bytes
from cacheslide.store.persistent.shape import Wanted
from tests.helpers.chunks import assert_same, chunk, encoded, name, tier
from tests.helpers.forged import HEADERS, OTHERS, ROW, SHAPE, header_of, opened, said, with_header
from tests.helpers.tiered import key

pytestmark = pytest.mark.slow


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
