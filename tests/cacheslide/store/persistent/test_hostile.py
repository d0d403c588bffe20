"""Whatever lies in a store's folder, opening and looking up end in time, with a hit or a miss, and spoil no file."""

import errno
import json
import os
import re
import socket
import stat
import struct
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import xxhash

from cacheslide.errors import ConfigError, StoreError
from cacheslide.store import DirectoryChunkStore, open_store, permissions
from cacheslide.store.config import StoreConfig
from cacheslide.store.files import Files
from cacheslide.store.folder import Folder, Foreign
from cacheslide.store.persistent.filetier import FileOptions, FileTier, chunk_name, namespace_id
from cacheslide.store.persistent.record import Damaged, Encoded, chunk_of
from cacheslide.store.persistent.segments import MOST_NUMBER, ShardHead
from cacheslide.store.slide.spill import SpillFile, stale_spills
from tests.helpers.chunks import MIB, assert_same, chunk, segment_files, tier

N = 12
LIMIT_S = 120.0  # what would hang; opening is meant to end within 30 s, a look-up within 1
pytestmark = [pytest.mark.fault("hostile_store"), pytest.mark.slow]


def key(i: int) -> str:
    """Keys that spread over the shards."""
    return f"{i * 0x9E3779B97F4A7C15F39CC0605CEDC8341082276B % 2**160:040x}"


def name(i: int) -> bytes:
    return chunk_name(namespace_id(""), key(i))


def encoded(i: int) -> Encoded:
    return Encoded.of(name(i), chunk(i), 16)


def in_time(work):
    """What `work()` returns or raises, unless it takes longer than anything here may."""
    out = []

    def run():
        try:
            out.append((work(), None))
        except BaseException as error:
            out.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    assert out, "it hangs"
    if out[0][1] is not None:
        raise out[0][1]
    return out[0][0]


def snapshot(folder: Path) -> dict:
    """What is in a folder of somebody else's."""
    return {
        p: (p.lstat().st_mode, p.read_bytes() if stat.S_ISREG(p.lstat().st_mode) else None)
        for p in sorted(folder.rglob("*"))
    }


def seen(path: Path, **kw) -> tuple[int, int]:
    """Hits and misses of all chunks; each hit is compared."""
    store = tier(path, **kw)
    hits = misses = 0
    for i in range(N):
        try:
            found = store.read(name(i))
        except (Damaged, Foreign):
            found = None
        if found is None:
            misses += 1
        else:
            assert_same(chunk_of(*found), chunk(i))
            hits += 1
    with suppress(StoreError):
        store.write([encoded(100 + i) for i in range(4)])
    return hits, misses


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("shard-*"))


def swap(path: Path, make) -> None:
    """Put something else where `path` is."""
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name(path.name + ".was"))
    else:
        path.unlink(missing_ok=True)
    make(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as s:  # the name outlives it
        here = os.open(path.parent, os.O_RDONLY)
        s.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)


def a_device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # as /dev/zero
    except PermissionError:
        pytest.skip("making a device needs root")


def a_link(target: str):
    return lambda path: path.symlink_to(target)


KINDS = {
    "a pipe": os.mkfifo,
    "a socket": a_socket,
    "a device": a_device,
    "a folder": Path.mkdir,
    "a link to nothing": a_link("nothing"),
    "a link to /dev/zero": a_link("/dev/zero"),
    "a link to itself": lambda p: p.symlink_to(p),
    "a link to a file": None,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["segment", "head", "lock", "format.json", "shard"])
def test_nothing_but_plain_files_is_opened(tmp_path, where, kind):
    tier(tmp_path / "s").write([encoded(i) for i in range(N)])
    outside = tmp_path / "outside"
    outside.mkdir()
    victim = outside / "victim"
    victim.write_bytes(b"precious" * 1000)
    (outside / "seg-0000000001.log").write_bytes(b"precious" * 1000)
    before = snapshot(outside)
    first = shards(tmp_path / "s")[0]
    places = {"segment": segment_files(first)[0], "head": first / "head", "lock": first / "lock", "shard": first}
    place = places.get(where, tmp_path / "s/format.json")
    target = outside if where == "shard" else victim
    swap(place, KINDS[kind] or a_link(str(target)))
    if where == "format.json":
        with pytest.raises(StoreError) as refused:
            in_time(lambda: seen(tmp_path / "s"))
        assert "\n" not in str(refused.value)
    else:
        hits, misses = in_time(lambda: seen(tmp_path / "s"))
        assert hits >= 1 and (misses >= 1 or where in ("head", "lock"))
    assert snapshot(outside) == before
    assert os.path.lexists(place)  # it is not the store's to remove


ODD = [
    "seg-².log", "seg-٣.log", "seg-" + "9" * 200 + ".log", "seg-9999999999.log", "seg--1.log", "seg-+000000001.log",
    "seg-0x00000001.log", "seg-00000000 1.log", "seg-\n000000001.log", "seg-1.log", "seg-.log", "seg-00000000001.log",
    "head ", "lock\n", "x" * 255,
]  # fmt: skip


@pytest.mark.parametrize("headless", [False, True])
def test_odd_names_are_left_alone(tmp_path, headless):
    tier(tmp_path / "s").write([encoded(i) for i in range(N)])
    for folder in shards(tmp_path / "s"):
        for odd in ODD:
            (folder / odd).write_bytes(b"precious")
        if headless:
            (folder / "head").unlink()
    assert in_time(lambda: seen(tmp_path / "s")) == (N, 0)
    assert all((folder / odd).read_bytes() == b"precious" for folder in shards(tmp_path / "s") for odd in ODD)


def block(**changes) -> bytes:
    about = {"format": 1, "kind": "cacheslide-segment", "salt": "00" * 16, "log": 0} | changes
    return json.dumps(about).encode().ljust(4096, b"\0")


FIRST = {
    "nothing": b"",
    "zeros": bytes(8192),
    "nested": b"[" * 4096,
    "Infinity": block(log=float("inf")),
    "log 7": block(log=7),
    "log true": block(log=True),
    "a list": b"[]".ljust(4096, b"\0"),
    "salt a number": block(salt=5),
    "salt short": block(salt="00"),
    "no hex": block(salt="zz" * 16),
    "another format": block(format=2),
    "another kind": block(kind="notes"),
    "text": "notes of mine ².\n".encode() * 500,
    "sound, and no records": block() + b"notes of mine" * 5000,
}
LIKE_OURS = ("log 7", "log true", "Infinity", "no hex", "salt short", "sound, and no records")


@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize("kind", FIRST)
def test_a_bad_first_block_costs_its_segment_alone(tmp_path, kind, headless):
    """A foreign file that is called like a segment stays: what the store did not write it does not remove."""
    tier(tmp_path / "s").write([encoded(i) for i in range(N)])
    for folder in shards(tmp_path / "s"):
        for number in (0, 9):  # between what is there and what comes next
            (folder / f"seg-{number:010d}.log").write_bytes(FIRST[kind])
        if headless:
            (folder / "head").write_bytes(b"x" * 64)
    assert in_time(lambda: seen(tmp_path / "s")) == (N, 0)
    kept = [f.read_bytes() == FIRST[kind] for f in (tmp_path / "s").rglob("seg-000000000[09].log")]
    assert (kept == [True] * 4) or kind in LIKE_OURS
    assert in_time(lambda: seen(tmp_path / "s")) == (N, 0)


def packed(**changes) -> bytes:
    return ShardHead(**({"epoch": 1, "seq": 5, "last": 1, "open": ((1, 4096), (0, 0))} | changes)).pack()


HEADS = {
    "torn": b"CSLD",
    "of another format": packed()[:8] + (2).to_bytes(4, "little") + packed()[12:-8],
    "last 2^63": packed(last=2**63),
    "last at its end": packed(last=MOST_NUMBER),
    "epoch 2^64 - 1": packed(epoch=2**64 - 1),
    "seq 2^64 - 1": packed(seq=2**64 - 1),
    "open beyond last": packed(open=((9, 4096), (9, 4096))),
    "open and empty": packed(open=((1, 0), (0, 0))),
    "an odd length": packed(open=((1, 5), (0, 0))),
    "lengths far too long": packed(open=((1, 2**34 - 4096), (1, 2**34 - 4096))),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_with_a_right_checksum_and_lies_stops_nothing(tmp_path, kind):
    tier(tmp_path / "s").write([encoded(i) for i in range(N)])
    raw = HEADS[kind]
    raw = raw + xxhash.xxh3_64(raw).digest()[::-1] if len(raw) == 56 else raw
    for folder in shards(tmp_path / "s"):
        (folder / "head").write_bytes(raw)
    in_time(lambda: seen(tmp_path / "s"))
    store = tier(tmp_path / "s")
    store.write([encoded(200 + i) for i in range(6)])
    again = tier(tmp_path / "s")
    for i in range(6):
        assert_same(chunk_of(*again.read(name(200 + i))), chunk(200 + i))


@pytest.mark.parametrize("size", [64 + 1, 1 << 30])
def test_a_head_that_is_longer_than_one_is_read_no_further(tmp_path, size):
    tier(tmp_path / "s").write([encoded(i) for i in range(N)])
    for folder in shards(tmp_path / "s"):
        os.truncate(folder / "head", size)
    assert in_time(lambda: seen(tmp_path / "s")) == (N, 0)


@pytest.mark.parametrize("size", [1 << 30, (1 << 34) - 4096, 1 << 40])
@pytest.mark.parametrize("headless", [False, True])
def test_a_huge_sparse_segment_ends(tmp_path, size, headless):
    tier(tmp_path / "s").write([encoded(i) for i in range(N)])
    for folder in shards(tmp_path / "s"):
        odd = folder / "seg-0000000000.log"
        odd.write_bytes(block())
        os.truncate(odd, size)
        if headless:
            (folder / "head").unlink()
    assert in_time(lambda: seen(tmp_path / "s")) == (N, 0)


def test_what_is_not_taken_in_in_time_comes_later(tmp_path):
    store = tier(tmp_path / "s", shards=1)
    store.write([encoded(i) for i in range(N)])
    late = FileTier(FileOptions(tmp_path / "s", 8 * MIB, 1, durable=False))
    index = type(late.shards[0].index)(late.shards[0].folder)
    assert index.refresh(limit_s=0.0) and not index.places
    assert index.find(name(3)) is not None and len(index.places) == N


def test_a_segment_that_is_cut_short_underneath_is_a_miss(tmp_path):
    store = tier(tmp_path / "s", shards=1)
    store.write([encoded(i) for i in range(N)])
    [file] = segment_files(tmp_path / "s")
    os.truncate(file, 4096 + encoded(0).size // 2)
    with pytest.raises(Damaged):
        store.read(name(0))
    files = DirectoryChunkStore(tmp_path / "d")
    files.put("ab", chunk(1))
    held = files.get("ab")
    os.truncate(tmp_path / "d/ab.safetensors", 100)  # a mapped file would end the process here
    assert_same(held, chunk(1))
    assert files.get("ab") is None


def test_hard_links_are_not_written_through(tmp_path):
    tier(tmp_path / "s").write([encoded(i) for i in range(N)])
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    for folder in shards(tmp_path / "s"):
        for entry in ("lock", "head"):
            (folder / entry).unlink()
            os.link(victim, folder / entry)
    assert in_time(lambda: seen(tmp_path / "s")) == (N, 0)
    assert victim.read_bytes() == b"precious"


def test_a_lock_file_with_other_content_is_taken_and_kept(tmp_path):
    tier(tmp_path / "s").write([encoded(i) for i in range(N)])
    for folder in shards(tmp_path / "s"):
        (folder / "lock").write_bytes(b"precious" * 100)
    store = tier(tmp_path / "s")
    store.write([encoded(50)])
    assert_same(chunk_of(*store.read(name(50))), chunk(50))
    assert all((folder / "lock").read_bytes() == b"precious" * 100 for folder in shards(tmp_path / "s"))


def test_one_folder_that_is_not_the_stores_costs_its_shard_alone(tmp_path):
    tier(tmp_path / "s", shards=4).write([encoded(i) for i in range(N)])
    swap(shards(tmp_path / "s")[1], a_link("/etc"))
    store = open_store(
        {"path": str(tmp_path / "s"), "host_gib": 1e-4, "file_gib": 0.02, "spill_gib": 0, "direct": False},
        2 * 2 * 8 * 4,
    )
    for i in range(50, 50 + N):
        store.put(key(i), chunk(i))
    assert store.flush(60)
    kept = [store.contains(key(i)) for i in range(50, 50 + N)]
    assert sum(kept) > 0 and not store.persistent.file_breaker.failures
    assert store.stats.write_errors > 0 or all(kept)
    store.close()


@pytest.mark.parametrize("mode", [0o777, 0o772, 0o707])
def test_folders_that_others_may_write_are_refused_unless_asked_for(tmp_path, mode):
    folder = tmp_path / "s"
    tier(folder).write([encoded(1)])
    folder.chmod(mode)
    config = {"path": str(folder), "host_gib": 1e-4, "file_gib": 0.02, "spill_gib": 0.001}
    with pytest.raises(StoreError, match=r"written by others \(mode [0-7]+\).*shared_folder") as refused:
        open_store(config, 256)
    assert "\n" not in str(refused.value)
    with pytest.raises(StoreError, match="written by others"):
        DirectoryChunkStore(folder)
    store = open_store(config | {"shared_folder": True}, 256)
    assert store.persistent.file.contains(name(1))
    store.close()
    DirectoryChunkStore(folder, shared=True)
    folder.chmod(0o1777)  # as /tmp: nobody can remove or rename what is not theirs
    assert tier(folder).contains(name(1))


def grant(folder: Path, entries: list[tuple[int, int, int]], mask: int) -> None:
    """Give the folder a POSIX access list: its owner may all, its group and the rest nothing."""
    nobody = 2**32 - 1
    listed = sorted([(1, 7, nobody), (4, 0, nobody), *entries, (16, mask, nobody), (32, 0, nobody)])
    raw = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in listed)
    try:
        os.setxattr(folder, "system.posix_acl_access", raw)
    except OSError as refused:
        if refused.errno != errno.EOPNOTSUPP:
            raise
        pytest.skip("a file system without access lists")


OWN = os.geteuid()


@pytest.mark.parametrize(
    ("entries", "mask", "who"),
    [
        ([(2, 7, 65534)], 7, "user 65534"),
        ([(2, 5, 65534), (2, 2, 65533)], 7, "user 65533"),
        ([(8, 7, 65534)], 7, "group 65534"),
        ([(2, 7, 65534)], 5, None),  # the mask takes it away
        ([(2, 5, 65534)], 7, None),
        ([(2, 7, OWN)], 7, None),
    ],
)
def test_an_access_list_is_read(tmp_path, monkeypatch, entries, mask, who):
    """The group is made the user's own: by the mode alone, which shows the mask, the folder would be private."""
    monkeypatch.setattr(permissions, "_own_group", lambda gid: gid == os.getegid())
    folder = tmp_path / "s"
    tier(folder).write([encoded(1)])
    grant(folder, entries, mask)
    if who is None:
        assert tier(folder).contains(name(1))
        return
    with pytest.raises(StoreError, match=rf"written by others \(an access list lets {who}\).*shared_folder") as refused:
        tier(folder)
    assert "\n" not in str(refused.value)
    with pytest.raises(StoreError, match="written by others"):
        DirectoryChunkStore(folder)
    assert tier(folder, shared=True).contains(name(1))


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("through_link", [False, True])
def test_a_folder_that_others_could_move_away_is_refused(tmp_path, depth, through_link):
    parent = tmp_path / "open"
    folder = parent.joinpath(*"abc"[: depth - 1], "s")
    folder.mkdir(parents=True, mode=0o700)
    used = folder
    if through_link:
        used = tmp_path / "link"
        used.symlink_to(folder)
    tier(used).write([encoded(1)])
    parent.chmod(0o777)
    config = {"path": str(used), "host_gib": 1e-4, "file_gib": 0.02, "spill_gib": 0.001}
    said = rf"moved away by others, who may write to {parent} \(mode 777\).*shared_folder"
    with pytest.raises(StoreError, match=said) as refused:
        open_store(config, 256)
    assert "\n" not in str(refused.value)
    with pytest.raises(StoreError, match=said):
        DirectoryChunkStore(used)
    assert tier(used, shared=True).contains(name(1))
    parent.chmod(0o1777)  # as /tmp
    assert tier(used).contains(name(1))


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")
def test_what_belongs_to_others_is_skipped(tmp_path):
    tier(tmp_path / "s").write([encoded(i) for i in range(N)])
    first, second = shards(tmp_path / "s")
    os.chown(segment_files(first)[0], 65534, 65534)
    lost = [i for i in range(N) if tier(tmp_path / "s").shard(name(i)).path == first]
    assert in_time(lambda: seen(tmp_path / "s")) == (N - len(lost), len(lost))
    assert tier(tmp_path / "s", shared=True).read(name(lost[0])) is not None
    os.chown(second, 65534, 65534)
    assert in_time(lambda: seen(tmp_path / "s"))[0] == 0
    os.chown(tmp_path / "s", 65534, 65534)
    with pytest.raises(StoreError, match=r"belongs to user 65534.*shared_folder"):
        tier(tmp_path / "s")


def test_the_configured_folder_may_be_a_link(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "s").symlink_to(tmp_path / "real")
    tier(tmp_path / "s").write([encoded(1)])
    assert tier(tmp_path / "real").contains(name(1))


def test_stale_spill_files_are_the_stores_own_alone(tmp_path):
    folder, files = tmp_path / "spill", Files()
    folder.mkdir(mode=0o700)
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (folder / "notes.spill").write_bytes(b"precious")
    os.mkfifo(folder / f"1-{'0' * 32}.spill")
    (folder / f"2-{'0' * 32}.spill").symlink_to(victim)
    (folder / f"3-{'0' * 32}.spill").write_bytes(b"a dead process's")
    removed = in_time(lambda: stale_spills(Folder(folder, files)))
    assert removed == 1 and victim.read_bytes() == b"precious" and (folder / "notes.spill").exists()
    spill = in_time(lambda: SpillFile(folder, 1 << 20, 4096, files))
    assert in_time(lambda: spill.write(torch.zeros(2, 4096, dtype=torch.uint8))) == [0, 1]
    spill.close()


def test_a_spill_folder_that_is_a_link_leaves_the_store_usable(tmp_path):
    (tmp_path / "s").mkdir(mode=0o700)
    (tmp_path / "s/spill").symlink_to("/etc")
    store = open_store({"path": str(tmp_path / "s"), "host_gib": 1e-4, "file_gib": 0.02, "spill_gib": 0.001}, 256)
    store.put(key(1), chunk(1))
    assert store.spill is None and store.flush(60) and store.contains(key(1)) and store.close()


CHUNK_FILES = {
    "nothing": b"",
    "zeros": bytes(9000),
    "a header of 2^63 bytes": (2**63).to_bytes(8, "little") + b"{}",
    "nested": (60_000).to_bytes(8, "little") + b"[" * 60_000,
    "no tensors": (2).to_bytes(8, "little") + b"{}",
    "text": b"notes of mine\n" * 100,
}


@pytest.mark.parametrize("kind", [*CHUNK_FILES, *KINDS])
def test_a_folder_of_chunk_files_ends_with_a_miss_and_keeps_what_is_not_its_own(tmp_path, kind):
    store = DirectoryChunkStore(tmp_path / "d")
    place, victim = tmp_path / "d/ab.safetensors", tmp_path / "victim"
    victim.write_bytes(b"precious")
    if kind in CHUNK_FILES:
        place.write_bytes(CHUNK_FILES[kind])
    else:
        (KINDS[kind] or a_link(str(victim)))(place)
    assert not in_time(lambda: store.contains("ab"))
    assert in_time(lambda: store.get("ab")) is None
    in_time(lambda: store.put("ab", chunk(1)))
    assert in_time(lambda: store.get("ab")) is None
    assert os.path.lexists(place) and victim.read_bytes() == b"precious"
    assert kind not in CHUNK_FILES or place.read_bytes() == CHUNK_FILES[kind]
    assert not list((tmp_path / "d").glob("*.tmp"))
    store.put("cd", chunk(2))
    assert_same(store.get("cd"), chunk(2))


@pytest.mark.parametrize(
    "raw",
    [{"host_gib": float("nan")}, {"file_gib": float("inf")}, {"remote_gib": 10**400}, {"queue_mib": 10**30},
     {"path": "a\0b"}, {"path": "a\nb"}, {"remote_host": "a\r\nb"}],
)  # fmt: skip
def test_settings_that_no_machine_can_have_are_one_line(raw):
    with pytest.raises(ConfigError) as refused:
        StoreConfig.from_dict(raw)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 200


class Counted(Files):
    """Counts what is asked of the disk."""

    def __init__(self) -> None:
        self.calls = []

    def open(self, path, **kw):
        self.calls.append(("open", re.sub(r"\d+", "#", str(path))))
        return super().open(path, **kw)

    def read(self, fd, buffer, offset):
        self.calls.append(("read", len(buffer)))
        return super().read(fd, buffer, offset)


@pytest.mark.fault("tenant_key")
def test_a_look_up_does_the_same_for_another_tenants_chunk_and_for_none(tmp_path):
    """No time to compare: the operations are the same, so there is nothing that could differ."""
    config = {"path": str(tmp_path / "s"), "host_gib": 1e-4, "file_gib": 0.02, "spill_gib": 0, "shards": 1}
    other = open_store(config, 256, namespace="other")
    for i in range(N):
        other.put(key(i), chunk(i))
    assert other.flush(60) and other.close()
    files = Counted()
    mine = open_store(config, 256, namespace="mine", files=files)
    costs = []
    for i in (3, 1003):  # what the other tenant has, and what nobody has
        for ask in (mine.contains, mine.get, mine.tier_of, lambda k: mine.fetch(k).why):
            files.calls.clear()
            assert ask(key(i)) in (False, None, "absent")
            costs.append(list(files.calls))
    assert costs[:4] == costs[4:] and all(costs)
    mine.close()
