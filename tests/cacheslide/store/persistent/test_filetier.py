"""The file tier: what goes in comes out, limits hold across processes, and damage is found, never served."""

import json
import multiprocessing
import os
import random
import stat
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from cacheslide.errors import StoreError
from cacheslide.store import ChunkKV
from cacheslide.store.files import BLOCK, Files
from cacheslide.store.pages import PageLayout, from_payload, side_by_side, to_payload
from cacheslide.store.persistent import record
from cacheslide.store.persistent.filetier import FileOptions, FileTier, chunk_name, namespace_id
from cacheslide.store.persistent.record import Damaged, Encoded, chunk_of, page_sums
from tests.helpers.chunks import MIB, assert_same, chunk, encoded, name, segment_files, tier

pytestmark = pytest.mark.slow


def read(store: FileTier, i: int) -> ChunkKV | None:
    found = store.read(name(i))
    return None if found is None else chunk_of(*found)


@pytest.mark.parametrize(
    ("n", "page", "inputs", "dtype"),
    [
        (40, 16, (1,), torch.float32),
        (1, 16, (), torch.bfloat16),
        (48, 16, (0, 2), torch.float16),
        (33, 1, (), torch.float32),
    ],
)
def test_pages_cover_a_chunk_exactly(n, page, inputs, dtype):
    want = chunk(3, n=n, inputs=inputs, dtype=dtype)
    layout = PageLayout.of(want, page)
    payload = to_payload(want, layout)
    assert len(payload) == layout.payload_bytes == layout.bounds[-1] and len(layout.bounds) == layout.pages + 1
    assert_same(from_payload(payload, layout, want.positions, 1), want)
    for layer in range(want.k.shape[0]):  # a K/V page is the rows it says, key beside value
        for row in (0, n - 1):
            p = layout.page_of(layer, row)
            at = layout.bounds[p] + row % page * layout.row_bytes
            kv = payload[at : at + layout.row_bytes].view(dtype).view(2, 2, 8)
            assert torch.equal(kv[0], want.k[layer, row]) and torch.equal(kv[1], want.v[layer, row])
    kv_pages = layout.layers * layout.layer_pages
    assert sum(layout.rows_of(p) for p in range(kv_pages)) == layout.layers * n
    assert sum(layout.rows_of(p) for p in range(kv_pages, layout.pages)) == len(inputs) * n


@pytest.mark.parametrize("direct", [False, True])
def test_round_trip_and_reopening(tmp_path, direct):
    store = tier(tmp_path / "s", direct=direct)
    assert read(store, 1) is None
    store.write([encoded(i) for i in range(9)])
    again = tier(tmp_path / "s", direct=direct)
    for s in (store, again):
        assert len(s) == 9
        for i in range(9):
            assert_same(read(s, i), chunk(i))
    assert store.nbytes == again.nbytes == sum(f.stat().st_size for f in tmp_path.rglob("seg-*"))


def test_files_are_private_and_keys_cannot_leave_the_folder(tmp_path):
    store = tier(tmp_path / "s")
    store.write([encoded(0)])
    for file in (tmp_path / "s").rglob("*"):
        want = 0o700 if file.is_dir() else 0o600
        assert stat.S_IMODE(file.stat().st_mode) == want, file
    for bad in ("../x", "", "A" * 40, "/" * 40, "0" * 39, None):
        with pytest.raises(StoreError, match="malformed"):
            chunk_name(namespace_id(""), bad)
    target = tmp_path / "elsewhere"
    target.write_text("keep")
    lock = next((tmp_path / "s").rglob("lock"))
    lock.unlink()
    lock.symlink_to(target)
    with pytest.raises(StoreError, match="symbolic"):
        for i in range(1, 9):
            store.write([encoded(i)])
    assert target.read_text() == "keep"


def test_namespaces_do_not_meet(tmp_path):
    store = tier(tmp_path / "s")
    store.write([Encoded.of(name(1, "a"), chunk(1), 16)])
    assert store.read(name(1, "a")) is not None
    assert store.read(name(1, "b")) is None and not store.contains(name(1, "b"))


def test_capacity_holds_at_every_step_and_novel_chunks_do_not_wash_out_used_ones(tmp_path):
    capacity = 40 * encoded(0).size
    store = tier(tmp_path / "s", capacity, shards=1)
    hits = []
    for i in range(600):
        if i % 5 == 0:
            wanted = 10_000 + i // 5 % 3
            hits.append(read(store, wanted) is not None)
            if not hits[-1]:
                store.write([encoded(wanted)])
        else:
            store.write([encoded(i)])
        assert sum(f.stat().st_size for f in tmp_path.rglob("seg-*")) <= capacity
    assert sum(hits[:20]) >= 15 and all(hits[-50:])
    assert store.shards[0].stats.evicted > 300
    with pytest.raises(StoreError, match="cannot fit"):
        store.write([Encoded.of(name(1), chunk(1, n=4000), 16)])


def test_a_clean_start_from_the_wrong_folder_says_so(tmp_path):
    tier(tmp_path / "s", shards=3)
    assert len(tier(tmp_path / "s", shards=2).shards) == 3  # the folder's own number wins
    note = tmp_path / "s/format.json"
    note.write_text(json.dumps({"kind": "cacheslide-store", "format": 2, "shards": 3}))
    with pytest.raises(StoreError, match="another kind or version"):
        tier(tmp_path / "s")
    note.write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        tier(tmp_path / "s")
    with pytest.raises(StoreError, match="cannot use"):
        tier(note)


def test_a_flipped_bit_anywhere_is_found(tmp_path):
    """Every stretch of a record: preamble, header, checksums, positions, pages; padding may change unnoticed."""
    store = tier(tmp_path / "s", shards=1)
    store.write([encoded(i) for i in range(3)])
    [file] = segment_files(tmp_path)
    sound, rng = file.read_bytes(), random.Random(5)
    place = store.shards[0].index.places[name(1)]
    spots = [place.offset + rng.randrange(place.size) for _ in range(150)] + [
        place.offset + i for i in range(0, 130, 9)
    ]
    found = 0
    for at in spots:
        bad = bytearray(sound)
        bad[at] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        for s in (store, tier(tmp_path / "s")):
            try:
                got = read(s, 1)
            except Damaged:
                got = None
            found += got is None
            if got is not None:
                assert_same(got, chunk(1))
        again = tier(tmp_path / "s")
        for i in (0, 2):
            assert_same(read(again, i), chunk(i))
        store = tier(tmp_path / "s")
    assert found > len(spots)


class Marked(Files):
    """Hands out memory full of ones and remembers it."""

    def __init__(self) -> None:
        self.given = []

    def buffer(self, nbytes):
        self.given.append(torch.full((nbytes,), 255, dtype=torch.uint8))
        return self.given[-1]


@pytest.mark.parametrize("n", [1, 40, 300])
def test_a_whole_record_lies_in_the_memory_that_was_given_for_it(tmp_path, n):
    tier(tmp_path / "s", shards=1).write([encoded(0), encoded(1, n=n)])
    files = Marked()
    found = chunk_of(*FileTier(FileOptions(tmp_path / "s", 8 * MIB, 1), files).read(name(1)))
    assert_same(found, chunk(1, n=n))
    [given] = files.given
    assert not len(given) % BLOCK and found.k.untyped_storage().data_ptr() == given.data_ptr()
    both = side_by_side(found.k, found.v)
    assert both.is_contiguous() and torch.equal(both, torch.stack((found.k, found.v), 2))
    assert both.data_ptr() == given.data_ptr()


def test_keys_and_values_are_side_by_side_in_pages_only():
    k, v = torch.randn(3, 5, 2, 4, 8).unbind(2)
    assert side_by_side(k, v).shape == (3, 5, 2, 4, 8)
    assert side_by_side(v, k) is None and side_by_side(k, k) is None
    assert side_by_side(k[1:], v[1:]) is not None  # whole layers
    assert side_by_side(k[:, 1:], v[:, 1:]) is None
    assert side_by_side(k, v.clone()) is None and side_by_side(k.contiguous(), v.contiguous()) is None
    assert side_by_side(*torch.randn(2, 3, 5, 4, 8)) is None


def without_whole(record: Encoded) -> Encoded:
    """As it was written before records had a checksum of the whole payload."""
    size = int.from_bytes(record.head[:8], "little")
    about = json.loads(record.head[8 : 8 + size])
    assert about.pop("whole")
    header = json.dumps(about, separators=(",", ":")).encode()
    return replace(record, head=len(header).to_bytes(8, "little") + header + record.head[8 + size :])


@pytest.mark.parametrize("old", [False, True])
def test_all_pages_are_checked_at_once_and_records_without_that_checksum_are_read(tmp_path, old, monkeypatch):
    store = tier(tmp_path / "s", shards=1)
    store.write([without_whole(encoded(1)) if old else encoded(1)])
    pages = []
    monkeypatch.setattr(record, "page_sums", lambda *a: (pages.append(a[2:]), page_sums(*a))[1])
    assert_same(read(store, 1), chunk(1))
    assert len(pages) == old
    assert store.read(name(1), [(0, 2)]) and pages[-1] == (0, 2)  # some pages are checked by their own
    [file] = segment_files(tmp_path / "s")
    raw = bytearray(file.read_bytes())
    at = raw.index(bytes(to_payload(chunk(1), PageLayout.of(chunk(1), 16)).numpy()[-64:]))
    raw[at] ^= 1
    file.write_bytes(raw)
    with pytest.raises(Damaged, match=r"page \d+ of \d+ does not match"):
        read(tier(tmp_path / "s", shards=1), 1)


@pytest.mark.parametrize("cut", ["half", "preamble", "gone", "zeros", "swapped"])
def test_torn_truncated_missing_and_swapped_records_are_misses(tmp_path, cut):
    store = tier(tmp_path / "s", shards=1)
    store.write([encoded(i) for i in range(4)])
    [file] = segment_files(tmp_path)
    places = store.shards[0].index.places
    first, last = places[name(1)], places[name(3)]
    raw = bytearray(file.read_bytes())
    if cut == "half":
        raw = raw[: last.offset + last.size // 2]
    elif cut == "preamble":
        raw = raw[: last.offset + 60]
    elif cut == "zeros":
        raw[last.offset + BLOCK : last.offset + last.size] = bytes(last.size - BLOCK)
    elif cut == "swapped":
        a, b = first.offset, last.offset
        raw[a : a + first.size], raw[b : b + last.size] = raw[b : b + last.size], raw[a : a + first.size]
    file.unlink() if cut == "gone" else file.write_bytes(raw)
    for s in (store, tier(tmp_path / "s")):
        for i in range(4):
            try:
                got = read(s, i)
            except Damaged:
                got = None
            if got is not None:
                assert_same(got, chunk(i))
            assert got is None if i == 3 or cut == "gone" else got is not None or cut == "swapped"
    store.write([encoded(3)])  # the chunk is recomputed and kept again
    assert_same(read(tier(tmp_path / "s"), 3), chunk(3))


def test_a_damaged_head_or_segment_start_loses_no_more_than_it_must(tmp_path):
    store = tier(tmp_path / "s", shards=1)
    store.write([encoded(i) for i in range(3)])
    head = tmp_path / "s/shard-00/head"
    head.write_bytes(bytes(64))
    again = tier(tmp_path / "s")
    assert_same(read(again, 2), chunk(2))
    again.write([encoded(5)])
    assert [read(tier(tmp_path / "s"), i) is not None for i in (0, 1, 2, 5)] == [True] * 4
    file = segment_files(tmp_path)[0]
    raw = bytearray(file.read_bytes())
    raw[:20] = bytes(20)
    file.write_bytes(raw)
    last = tier(tmp_path / "s")
    assert [read(last, i) is not None for i in (0, 1, 2, 5)] == [False, False, False, True]
    last.write([encoded(0)])
    assert_same(read(last, 0), chunk(0))


def _fill(path, first, count):
    store = tier(path, 60 * encoded(0).size, lock_timeout_s=300)
    for i in range(first, first + count):
        store.write([encoded(i)])


def _die_holding(path):
    tier(path, shards=1).shards[0].lock.acquire()
    os._exit(9)


def segments(path) -> dict:
    """Segment files and their sizes, one after the other."""
    found = {}
    for file in path.rglob("seg-*"):
        with suppress(FileNotFoundError):
            found[file] = file.stat().st_size
    return found


def clean_processes():
    """Not forked from here: a process that has run threads leaves its child locks that nobody will open."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def test_processes_share_a_folder_and_its_capacity(tmp_path):
    context = clean_processes()
    workers = [context.Process(target=_fill, args=(tmp_path / "s", 100 * w, 30)) for w in range(3)]
    for w in workers:
        w.start()
    seen = tier(tmp_path / "s", 60 * encoded(0).size)
    most, alive = 0, True
    while alive:
        alive = any(w.is_alive() for w in workers)  # the last look comes after their ends
        before, after = segments(tmp_path), segments(tmp_path)
        if before == after:  # else sizes of different moments would be added up
            most = max(most, sum(before.values()))
    for w in workers:
        w.join()
        assert w.exitcode == 0
    assert 0 < most <= 60 * encoded(0).size
    served = 0
    for i in [100 * w + j for w in range(3) for j in range(30)]:
        got = read(seen, i)  # written by others after this process had opened the folder
        if got is not None:
            assert_same(got, chunk(i))
            served += 1
    assert 20 < served <= 60


def test_a_lock_held_too_long_is_an_error_and_a_dead_holders_lock_is_free(tmp_path):
    store, other = (tier(tmp_path / "s", shards=1, lock_timeout_s=0.05) for _ in range(2))
    store.shards[0].lock.acquire()
    with pytest.raises(StoreError, match=rf"process {os.getpid()} on .* kept the lock"):
        other.write([encoded(1)])
    store.shards[0].lock.release()
    p = clean_processes().Process(target=_die_holding, args=(tmp_path / "s",))
    p.start()
    p.join()
    other.write([encoded(1)])
    assert_same(read(store, 1), chunk(1))


class Torn(Files):
    """Writes half of a large buffer, then fails."""

    armed = True

    def write(self, fd, buffer, offset):
        if self.armed and len(buffer) > BLOCK:
            super().write(fd, buffer[: len(buffer) // 2], offset)
            raise OSError(28, "No space left on device")
        super().write(fd, buffer, offset)


def test_a_failed_write_publishes_nothing_and_leaves_no_bytes(tmp_path):
    files = Torn()
    store = FileTier(FileOptions(tmp_path / "s", MIB, shards=1, durable=False), files)
    with pytest.raises(OSError, match="No space"):
        store.write([encoded(1), encoded(2)])
    assert store.nbytes == sum(f.stat().st_size for f in tmp_path.rglob("seg-*")) == BLOCK
    assert read(store, 1) is None and read(tier(tmp_path / "s"), 2) is None
    files.armed = False
    store.write([encoded(1)])
    assert_same(read(tier(tmp_path / "s"), 1), chunk(1))
