"""One safetensors file per chunk in a folder: passes chunk KV between the steps of a workflow."""

import logging
import os
import re
import uuid
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save

from cacheslide.core.keys import ChunkKey
from cacheslide.errors import StoreError
from cacheslide.store.base import NOTE_NAME, ChunkKV, ChunkStore, Fetched
from cacheslide.store.files import Files
from cacheslide.store.folder import Folder, Foreign
from cacheslide.store.persistent.shape import ChunkShape
from cacheslide.store.tensorfile import TensorFile

_FORMAT, _SCORED, _NOTED = "1", "2", "3"  # format of a file with KV alone, with scores, with notes as well
_FORMATS = (_FORMAT, _SCORED, _NOTED)
_KEY = re.compile(r"[0-9a-f]{1,128}")
_FILE = re.compile(r"[0-9a-f]{1,128}\.safetensors")
_INPUT = re.compile(r"layer_input\.(0|[1-9][0-9]{0,8})")
_NOTE = re.compile(rf"note\.{NOTE_NAME.pattern}")
logger = logging.getLogger("cacheslide.store")


class DirectoryChunkStore(ChunkStore):
    """Chunks as `<key>.safetensors` under `root`, written under a temporary name and renamed into place.

    An unusable file is a miss with a reason. If its header says that this store wrote it, it is removed; other files
    with a chunk's name stay, and that chunk is not stored.

    Parameters
    ----------
    shared : bool
        Accept a folder that others may write to, or that belongs to another user.
    """

    def __init__(self, root: str | Path, *, shared: bool = False) -> None:
        super().__init__()
        self.root, self.files = Path(root), Files()
        self.folder = Folder(self.root, self.files, shared=shared, root=True)
        try:
            self.root.mkdir(mode=0o755, parents=True, exist_ok=True)
            with self.folder.handle():
                pass
        except (OSError, ValueError) as refused:
            why = getattr(refused, "strerror", None) or refused
            raise StoreError(f"cannot use {str(root)!r} as a folder of chunks: {why}") from None

    def _file(self, key: ChunkKey) -> str:
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise StoreError(f"malformed chunk key {key!r}: up to 128 hexadecimal digits are expected")
        return f"{key}.safetensors"

    def contains(self, key: ChunkKey) -> bool:
        name = self._file(key)
        try:
            fd = self.folder.open(name)
        except (OSError, Foreign):
            return False
        try:
            return TensorFile.of(fd).metadata.get("format") in _FORMATS
        except (OSError, ValueError):
            return False
        finally:
            self.files.close(fd)

    def get(self, key: ChunkKey) -> ChunkKV | None:
        return self.fetch(key).chunk

    def fetch(self, key: ChunkKey, shape: ChunkShape | None = None, tokens: int | None = None) -> Fetched:
        name, written = self._file(key), None
        try:
            fd = self.folder.open(name)
            try:
                written = _written(fd)
                chunk = _chunk(fd, self.files)
            finally:
                self.files.close(fd)
            if why := (shape or ChunkShape()).misfit_of(chunk, tokens):
                raise ValueError(why)
        except FileNotFoundError:
            return self.missed("absent")
        except (OSError, ValueError, KeyError, StoreError) as broken:
            why = f"{name} cannot be read ({broken})"
            logger.warning("CacheSlide computes a chunk again: %s", why)
            self.stats.damaged += 1
            if written:
                self._remove(name, written)
            return self.missed(why)
        self.stats.hits += 1
        self.stats.bytes_read += chunk.nbytes
        return Fetched(chunk, "file")

    def _remove(self, name: str, written: tuple[int, int]) -> None:
        """Remove a file written by this store, unless it has been replaced."""
        try:
            status = self.folder.entries(lambda entry: entry == name).get(name)
            if status is not None and (status.st_ino, status.st_mtime_ns) == written:
                self.folder.unlink(name)
        except (OSError, Foreign) as error:
            logger.warning("CacheSlide could not remove %s: %s", name, error)

    def put(self, key: ChunkKey, chunk: ChunkKV) -> None:
        name = self._file(key)
        if self.contains(key):
            return
        tensors = {"k": chunk.k, "v": chunk.v, "positions": chunk.positions}
        tensors |= {} if chunk.scores is None else {"scores": chunk.scores}
        tensors |= {f"layer_input.{layer}": x for layer, x in chunk.layer_inputs.items()}
        tensors |= {f"note.{name}": x.clone() for name, x in chunk.notes.items()}  # one may be a view of K
        format = _NOTED if chunk.notes else _FORMAT if chunk.scores is None else _SCORED
        part = f"{uuid.uuid4().hex}.tmp"
        try:
            raw = save(
                {n: t.contiguous() for n, t in tensors.items()},
                metadata={"format": format, "generation": str(chunk.generation)},
            )
            self._write(part, raw)
            kept = self.folder.settle(part, name)  # an existing file is not replaced
        except (OSError, SafetensorError) as full:
            raise StoreError(f"cannot write a chunk of {chunk.nbytes} bytes to {self.root}: {full}") from None
        finally:
            self.folder.unlink(part)
        if not kept and not self.contains(key):
            logger.warning("CacheSlide does not keep a chunk: %s is no file of this store", self.root / name)
            return
        self.stats.puts += 1
        self.stats.bytes_written += chunk.nbytes

    def _write(self, name: str, raw: bytes) -> None:
        fd = self.folder.open(name, new=True, write=True)
        try:
            self.files.write(fd, memoryview(raw), 0)
        finally:
            self.files.close(fd)

    def __len__(self) -> int:
        return len(self.folder.entries(lambda name: _FILE.fullmatch(name) is not None))

    @property
    def nbytes(self) -> int:
        files = self.folder.entries(lambda name: _FILE.fullmatch(name) is not None)
        return sum(status.st_size for status in files.values())


def _written(fd: int) -> tuple[int, int] | None:
    """Inode and time of a file that this store wrote; None for other files."""
    try:
        head = os.pread(fd, 1 << 12, 8)
    except OSError:
        return None
    status = os.fstat(fd)
    formats = (b'"format":"' + number.encode() + b'"' for number in _FORMATS)
    own_format = head.startswith(b'{"__metadata__":{') and any(part in head for part in formats)
    own_format = own_format and all(part in head for part in (b'"generation":"', b'"positions":{'))
    return (status.st_ino, status.st_mtime_ns) if own_format else None


def _chunk(fd: int, files: Files) -> ChunkKV:
    """The chunk in a file; ValueError, KeyError or StoreError for an invalid file."""
    file = TensorFile.of(fd)
    if file.metadata.get("format") not in _FORMATS:
        raise ValueError(f"it has chunk format {str(file.metadata.get('format'))[:20]!r}, expected {_FORMAT!r}")
    beside = {"positions", "scores"} if file.metadata["format"] == _SCORED else {"positions"}
    if file.metadata["format"] == _NOTED:
        beside |= {name for name in file.places if name == "scores" or _NOTE.fullmatch(name)}
    generation = file.metadata["generation"]
    if not re.fullmatch(r"[0-9]{1,9}", generation):
        raise ValueError("its generation is no count")
    layers = {name: _INPUT.fullmatch(name) for name in file.places.keys() - {"k", "v"} - beside}
    if not all(layers.values()):
        raise ValueError("it holds tensors that no chunk has")
    kinds = {place.dtype for name, place in file.places.items() if name not in beside}
    if len(kinds) != 1 or file.places["positions"].dtype.is_floating_point or not kinds.pop().is_floating_point:
        raise ValueError("its tensors have other dtypes than a chunk's")
    shapes = [file.places[name].shape for name in layers] + [file.places["positions"].shape]
    if any(len(shape) != 2 for shape in shapes[:-1]) or len(shapes[-1]) != 1:
        raise ValueError("its tensors have other shapes than a chunk's")
    held = file.read(fd, files)
    inputs = {int(match[1]): held[name] for name, match in sorted(layers.items())}
    scores = held["scores"] if "scores" in beside else None
    notes = {name.removeprefix("note."): held[name] for name in sorted(beside) if name.startswith("note.")}
    return ChunkKV(held["k"], held["v"], held["positions"], inputs, int(generation), scores, notes)
