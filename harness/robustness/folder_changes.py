"""Corruptions of a small store folder: links, special files, bits, lengths, forgeries, names, permissions.

Every change takes the folder's root, a foreign folder beside it, and a random generator.
"""

import json
import os
import random
import stat
import struct
import time
from contextlib import suppress
from pathlib import Path

import torch
import xxhash

from cacheslide.store.base import ChunkKV
from cacheslide.store.files import aligned_buffer
from cacheslide.store.persistent.filetier import chunk_name, namespace_id
from cacheslide.store.persistent.record import Encoded
from cacheslide.store.persistent.segments import ShardHead
from cacheslide.store.persistent.shape import ChunkShape

PAGE_TOKENS, CHUNKS = 2, 6
SHAPE = ChunkShape(layers=2, kv_heads=1, head_dim=4, dtype="float32", hidden=3, max_positions=64)
FOREIGN = b"precious " * 600
SALT = bytes(range(16))
_ODD = [-1, 0, 5, 2**31, 10**12, 10**30, 1.5, float("inf"), float("nan"), "3", None, [], {}, True, [[[]]]]
_MOST = 1 << 20  # largest file, in bytes, that is changed in memory


def made_chunk(i: int, tokens: int = 3, layers: int = 2, dim: int = 4, dtype: torch.dtype = torch.float32) -> ChunkKV:
    """Chunk number `i`, by default in the store's shape."""
    g = torch.Generator().manual_seed(i)
    k, v = torch.randn(2, layers, tokens, 1, dim, generator=g).to(dtype)
    return ChunkKV(k, v, torch.arange(tokens) + i)


def made_name(i: int) -> bytes:
    """Name of chunk number `i`."""
    return chunk_name(namespace_id(""), f"{(i + 1) * 0x9E3779B97F4A7C15F39CC0605CEDC8341082276B % 2**160:040x}")


RECORDS = [Encoded.of(made_name(i), made_chunk(i), PAGE_TOKENS) for i in range(CHUNKS)]


def forged(rng: random.Random) -> Encoded:
    """A record of one of the chunks with valid checksums, but a wrong shape or header."""
    i = rng.randrange(CHUNKS)
    kind = rng.randrange(8)
    if kind < 4:
        other = [{"tokens": rng.choice((1, 2, 4, 9))}, {"layers": rng.choice((1, 3))}, {"dim": rng.choice((2, 8))},
                 {"dtype": rng.choice((torch.float16, torch.bfloat16))}][kind]  # fmt: skip
        return Encoded.of(made_name(i), made_chunk(i, **other), PAGE_TOKENS)
    if kind == 4:
        away = ChunkKV(made_chunk(i).k, made_chunk(i).v, torch.tensor([-1, 64, 2**62])[torch.randperm(3)])
        return Encoded.of(made_name(i), away, PAGE_TOKENS)
    size = int.from_bytes(RECORDS[i].head[:8], "little")
    header = json.loads(RECORDS[i].head[8 : 8 + size])
    odd = rng.choice(
        [-1, 0, 5, 2**31, 10**12, 10**30, 1.5, float("inf"), float("nan"), "3", None, [], {}, True, [[[]]]]
    )
    if kind == 5:
        header["layout"][rng.choice(sorted(header["layout"]))] = odd
    else:
        header[rng.choice(sorted(header))] = odd
    raw = json.dumps(header).encode() if kind < 7 else rng.choice([b"[" * 9000, b"", b"[]", b'{"a":' * 900, b"\xff"])
    length = rng.choice([len(raw)] * 6 + [0, 2**63, len(raw) + 1])
    head = struct.pack("<Q", length) + raw + RECORDS[i].head[8 + size :]
    return Encoded(made_name(i), RECORDS[i].layout, 0, head, RECORDS[i].payload)


def segment(records: list[Encoded], rng: random.Random, lie: bool = False) -> bytes:
    """A whole segment file; with `lie` a preamble has wrong numbers with a valid checksum."""
    about = {"format": 1, "kind": "cacheslide-segment", "salt": SALT.hex(), "log": rng.randrange(2)}
    out = bytearray(json.dumps(about).encode().ljust(4096, b"\0"))
    for seq, record in enumerate(records, 1):
        raw = aligned_buffer(record.size)
        preamble = record.write_into(raw, seq, SALT, len(out))
        if lie and rng.random() < 0.5:
            field = rng.choice(["seq", "head", "payload", "head_sum"])
            value = rng.choice([0, 1, 4, 2**31, 2**32 - 1] + [2**34, 2**62, 2**64 - 1] * (field != "head"))
            raw[:128] = preamble._replace(**{field: value}).pack(SALT, len(out))
        if lie and rng.random() < 0.1:  # another version
            old = bytes(raw[:8]) + struct.pack("<I", rng.choice((0, 2, 99))) + bytes(raw[12:120])
            raw[:128] = old + struct.pack("<Q", xxhash.xxh3_64_intdigest(old))
        out += raw
    return bytes(out)


def _shard(root: Path) -> Path:
    return root / "shard-00"


def _any_file(root: Path, rng: random.Random) -> Path:
    found = [root / "format.json", *sorted(_shard(root).glob("*"))] if _shard(root).is_dir() else [root / "format.json"]
    return rng.choice(found)


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name(f"{path.name}.{time.monotonic_ns()}"))
    else:
        path.unlink(missing_ok=True)


def replaced(root: Path, outside: Path, rng: random.Random) -> None:
    """A link, pipe, socket, device, folder or hard link replaces a file or the shard."""
    place = rng.choice([_any_file(root, rng), _any_file(root, rng), _shard(root)])
    _clear(place)
    kind = rng.randrange(9)
    with suppress(OSError):  # making a device needs root
        if kind < 5:
            target = ("nothing", "/dev/zero", str(outside / "file"), str(outside), place.name)[kind]
            place.symlink_to(target)
        elif kind == 5:
            os.mkfifo(place)
        elif kind == 6:
            os.mknod(place, 0o600 | rng.choice((stat.S_IFCHR, stat.S_IFSOCK)), os.makedev(1, 5))
        elif kind == 7:
            place.mkdir(mode=0o700)
        else:
            os.link(outside / "file", place)


def bits(root: Path, outside: Path, rng: random.Random) -> None:
    """Bits or stretches of a file change."""
    place = _any_file(root, rng)
    if not place.is_file() or place.is_symlink() or place.stat().st_nlink > 1 or place.stat().st_size > _MOST:
        return
    raw = bytearray(place.read_bytes())
    for _ in range(rng.randint(1, 4)):
        if raw:
            at = rng.randrange(min(len(raw), rng.choice((200, 4096, 5000, 1 << 30))))
            if rng.random() < 0.7:
                raw[at] ^= 1 << rng.randrange(8)
            else:
                raw[at : at + 64] = rng.choice((bytes(64), rng.randbytes(64)))[: len(raw) - at]
    place.write_bytes(raw)


def lengths(root: Path, outside: Path, rng: random.Random) -> None:
    """A file is cut short, emptied or made huge."""
    place = _any_file(root, rng)
    if place.is_file() and not place.is_symlink() and place.stat().st_nlink == 1:
        size = place.stat().st_size
        os.truncate(place, rng.choice((0, rng.randrange(size + 1), size + 4096, 1 << 26, 1 << 34, 1 << 40)))


def forgeries(root: Path, outside: Path, rng: random.Random) -> None:
    """A segment of forged records, with or without a head that names it."""
    if not _shard(root).is_dir() or _shard(root).is_symlink():
        return
    records = [forged(rng) if rng.random() < 0.6 else rng.choice(RECORDS) for _ in range(rng.randint(1, 4))]
    raw = segment(records, rng, lie=rng.random() < 0.5)
    number = rng.choice((0, 1, 2, 3, 9, 2**30 - 1))
    place = _shard(root) / f"seg-{number:010d}.log"
    if place.is_symlink() or (place.exists() and not place.is_file()) or (place.exists() and place.stat().st_nlink > 1):
        return
    place.write_bytes(raw)
    place.chmod(0o600)  # with a valid head it no longer counts as a foreign file (`names`)
    head = _shard(root) / "head"
    if head.is_file() and not head.is_symlink() and head.stat().st_nlink == 1 and rng.random() < 0.7:
        number = rng.choice((number, 2**30 - 1))
        seq = rng.choice((len(records), 99, 2**61, 2**64 - 1))
        logs = ((number, rng.choice((len(raw), 4096, 0, 5, 2**33))), (rng.choice((0, number)), 0))
        head.write_bytes(ShardHead(rng.choice((0, 1, 7, 2**64 - 1)), seq, number, logs).pack())
    elif rng.random() < 0.5 and head.is_file() and not head.is_symlink():
        head.unlink()


_NAMES = [
    "seg-².log",
    "seg-٣.log",
    "seg-" + "9" * 200 + ".log",
    "seg--000000001.log",
    "seg-1.log",
    "seg-\n000000001.log",
    "seg-0000000000.log",
    "seg-9999999999.log",
    "format.json.tmp",
    "head.tmp",
    " ",
    "x" * 255,
]
_BLOCKS = [b"", FOREIGN, b"[" * 4096, b"{}", bytes(4096), b'{"format":2,"kind":"cacheslide-segment"}']


def names(root: Path, outside: Path, rng: random.Random) -> None:
    """A foreign file under an odd name, or under that of a segment."""
    place = rng.choice((root, _shard(root))) / rng.choice(_NAMES)
    with suppress(OSError):
        if place.parent.is_dir() and not place.parent.is_symlink() and not os.path.lexists(place):
            place.write_bytes(rng.choice(_BLOCKS))
            place.chmod(0o640)  # the mode marks foreign files


def notes(root: Path, outside: Path, rng: random.Random) -> None:
    """The folder's description file has other content."""
    place = root / "format.json"
    if not place.is_file() or place.is_symlink() or place.stat().st_nlink > 1:
        return
    values = (0, -1, 1, 257, 10**30, 1.5, "1", None, float("inf"), True, [1])
    about = {
        "kind": rng.choice(("cacheslide-store", "notes")),
        "format": rng.choice((1, 2)),
        "shards": rng.choice(values),
    }
    raw = [json.dumps(about).encode(), b"[" * 100_000, b"", b"[]", b'{"shards":1,"shards":1}', rng.randbytes(50)]
    place.write_bytes(rng.choice(raw))


def permissions(root: Path, outside: Path, rng: random.Random) -> None:
    """The folder, the shard or a file is writable by others, not writable, or owned by another user."""
    place = rng.choice((root, _shard(root), _any_file(root, rng)))
    if place.is_symlink() or not place.exists() or (place.is_file() and place.stat().st_nlink > 1):
        return
    if rng.random() < 0.3:
        with suppress(PermissionError):
            os.chown(place, 65534, 65534)
    else:
        place.chmod(rng.choice((0o777, 0o770, 0o000, 0o1777, 0o666, 0o400)))


CHANGES = (replaced, replaced, bits, bits, lengths, forgeries, forgeries, names, notes, permissions)
