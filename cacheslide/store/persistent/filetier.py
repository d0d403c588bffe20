"""The file tier: chunks on disk, distributed over shards."""

import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cacheslide.core.keys import ChunkKey
from cacheslide.errors import StoreError
from cacheslide.store.files import BLOCK, Files
from cacheslide.store.folder import Folder, Foreign
from cacheslide.store.persistent.placed import Runs
from cacheslide.store.persistent.record import Accept, Encoded, Head, anything
from cacheslide.store.persistent.shard import Shard
from cacheslide.store.strict import is_count, parse_object

_KEY = re.compile(r"[0-9a-f]{40}")
_FORMAT = {"kind": "cacheslide-store", "format": 1}
_NOTE_BYTES = 4096
OPEN_S = 30.0  # maximum time that opening spends on reading the index; look-ups read the rest


def namespace_id(namespace: str, rank: int = 0, ranks: int = 1) -> bytes:
    """Sixteen bytes that identify a tenant and a rank's KV heads on disk and in the remote tier.

    A namespace without NUL is hashed together with NUL and the rank, as in older stores; one with NUL, which could
    imitate that, is prefixed with its length and hashed with a separate tag.
    """
    if not 0 <= rank < ranks:
        raise StoreError(f"rank must lie in 0 to {ranks - 1}, not {rank}")
    text, person = namespace.encode("utf-8", "surrogatepass"), b"cacheslide-ns"
    if b"\0" in text:
        text, person = len(text).to_bytes(8, "little") + text, b"cacheslide-ns-2"
    text += f"\0rank {rank} of {ranks}".encode() if ranks > 1 else b""
    return hashlib.blake2b(text, digest_size=16, person=person).digest()


def chunk_name(namespace: bytes, key: ChunkKey) -> bytes:
    """Namespace and key, 36 bytes; StoreError for a key that `chunk_keys` cannot return."""
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise StoreError(f"malformed chunk key {key!r}: 40 hexadecimal digits are expected")
    return namespace + bytes.fromhex(key)


@dataclass(frozen=True)
class FileOptions:
    """Settings of the file tier.

    `capacity` in bytes is that of the folder, for all writers; it is divided evenly over `shards`, which is fixed when
    the folder is created. Other fields: see `Shard`; `shared` also applies to the folder itself.
    """

    path: Path
    capacity: int
    shards: int = 4
    segment_bytes: int = 64 << 20
    lock_timeout_s: float = 10.0
    direct: bool = False
    durable: bool = True
    shared: bool = False
    strike: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.shards <= 256:
            raise StoreError(f"a store has 1 to 256 shards, not {self.shards}")
        if self.capacity // self.shards < 16 * BLOCK:
            raise StoreError(f"{self.capacity} bytes are too few for {self.shards} shards: give 64 KiB a shard or more")


class FileTier:
    """Records of all namespaces in one folder. Thread-safe and shared between processes."""

    def __init__(self, options: FileOptions, files: Files | None = None) -> None:
        self.options, self.files = options, files or Files()
        path, until = Path(options.path), time.monotonic() + OPEN_S
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            shards = self._shards_on_disk(Folder(path, self.files, shared=options.shared, root=True))
            each = options.capacity // shards
            self.shards = [
                Shard(
                    path / f"shard-{i:02x}",
                    each,
                    options.segment_bytes,
                    self.files,
                    lock_timeout_s=options.lock_timeout_s,
                    direct=options.direct,
                    durable=options.durable,
                    shared=options.shared,
                    strike=options.strike,
                    limit_s=max(0.0, until - time.monotonic()),
                )
                for i in range(shards)
            ]
        except OSError as refused:
            raise StoreError(f"cannot use {path} as a chunk store: {refused.strerror}") from None
        except ValueError as wrong:  # a path with NUL
            raise StoreError(f"cannot use {str(path)!r} as a chunk store: {wrong}") from None

    def _shards_on_disk(self, root: Folder) -> int:
        """The folder's number of shards; written once, by the first process."""
        note = root.path / "format.json"
        try:
            raw = root.read("format.json", _NOTE_BYTES)
        except FileNotFoundError:
            self._describe(root)
            raw = root.read("format.json", _NOTE_BYTES)
        try:
            values = parse_object(raw, _NOTE_BYTES)
            shards = values["shards"]
        except (ValueError, KeyError):
            raise StoreError(f"{note} is damaged: restore it, or remove the folder") from None
        if {k: values.get(k) for k in _FORMAT} != _FORMAT or not is_count(shards, 1, 256):
            raise StoreError(f"{note} describes another kind or version of store: use another folder")
        return shards

    def _describe(self, root: Folder) -> None:
        text = json.dumps(_FORMAT | {"shards": self.options.shards}).encode()
        part = f"format.{os.getpid()}-{uuid.uuid4().hex}.tmp"
        fd = root.open(part, new=True, write=True)
        try:
            self.files.write(fd, memoryview(text), 0)
            self.files.sync(fd)
        finally:
            self.files.close(fd)
        root.settle(part, "format.json")  # unless another process has written it
        root.unlink(part)

    @property
    def largest(self) -> int:
        """Bytes of the largest record that fits."""
        return min(s.capacity for s in self.shards) - 2 * BLOCK

    def shard(self, name: bytes) -> Shard:
        """The shard of `name`; chosen by the key, so all tenants share all shards."""
        return self.shards[name[16] % len(self.shards)]

    def contains(self, name: bytes) -> bool:
        """Whether a record of this name is published; does not read its pages."""
        return self.shard(name).index.find(name) is not None

    def read(self, name: bytes, runs: Runs | None = None, accept: Accept = anything) -> tuple[Head, Tensor] | None:
        """See `Shard.read`."""
        return self.shard(name).read(name, runs, accept)

    def head(self, name: bytes) -> Head | None:
        """A record's layout, positions and checksums without its pages; None if there is none."""
        record = self.read(name, [])
        return None if record is None else record[0]

    def write(self, records: Iterable[Encoded]) -> int:
        """Append new records, in one sequential write per shard; returns the bytes written.

        A shard whose folder is not the store's writes nothing; Foreign is raised after the others have written.
        """
        groups: dict[int, list[Encoded]] = {}
        for r in records:
            groups.setdefault(r.name[16] % len(self.shards), []).append(r)
        written, wrong = 0, None
        for i, group in groups.items():
            try:
                missing = [r for r in group if not self.contains(r.name)]
                written += self.shards[i].append(missing) if missing else 0
            except Foreign as foreign:
                wrong = foreign
        if wrong is not None:
            raise wrong
        return written

    def names(self) -> Iterator[bytes]:
        """Names of all records of all namespaces."""
        for shard in self.shards:
            with suppress(Foreign):
                shard.index.refresh()
            yield from list(shard.index.places)

    def __len__(self) -> int:
        return sum(len(s.index.places) for s in self.shards)

    @property
    def nbytes(self) -> int:
        """Bytes of all segment files."""
        return sum(s.index.nbytes for s in self.shards)
