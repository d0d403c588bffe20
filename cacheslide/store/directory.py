"""One safetensors file per chunk in a folder: how a workflow hands chunk KV caches from one step to the next."""

import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cacheslide.errors import StoreError
from cacheslide.keys import ChunkKey
from cacheslide.store.base import ChunkKV, ChunkStore

_FORMAT = "1"


class DirectoryChunkStore(ChunkStore):
    """Chunks as `<key>.safetensors` under `root`, written under a temporary name and renamed into place."""

    def __init__(self, root: str | Path) -> None:
        super().__init__()
        self.root = Path(root)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as refused:
            raise StoreError(f"cannot use {root} as a folder of chunks: {refused.strerror}") from None

    def _file(self, key: ChunkKey) -> Path:
        if not key or any(c not in "0123456789abcdef" for c in key):
            raise StoreError(f"malformed chunk key {key!r}: hexadecimal digits are expected")
        return self.root / f"{key}.safetensors"

    def contains(self, key: ChunkKey) -> bool:
        return self._file(key).is_file()

    def get(self, key: ChunkKey) -> ChunkKV | None:
        file = self._file(key)
        try:
            with safe_open(file, framework="pt") as f:
                meta = f.metadata() or {}
                if meta.get("format") != _FORMAT:
                    raise StoreError(f"{file.name} has chunk format {meta.get('format')!r}, expected {_FORMAT!r}")
                names = [n for n in f.keys() if n.startswith("layer_input.")]  # noqa: SIM118 (safe_open is no mapping)
                inputs = {int(n.split(".")[1]): f.get_tensor(n) for n in names}
                chunk = ChunkKV(
                    f.get_tensor("k"), f.get_tensor("v"), f.get_tensor("positions"), inputs, int(meta["generation"])
                )
        except FileNotFoundError:
            self.stats.misses += 1
            return None
        except SafetensorError as broken:
            raise StoreError(f"{file.name} cannot be read ({broken}); delete it to have the chunk rebuilt") from None
        self.stats.hits += 1
        self.stats.bytes_read += chunk.nbytes
        return chunk

    def put(self, key: ChunkKey, chunk: ChunkKV) -> None:
        file = self._file(key)
        if file.is_file():
            return
        tensors = {"k": chunk.k, "v": chunk.v, "positions": chunk.positions}
        tensors |= {f"layer_input.{layer}": x for layer, x in chunk.layer_inputs.items()}
        tensors = {name: t.contiguous() for name, t in tensors.items()}
        handle, name = tempfile.mkstemp(dir=self.root, suffix=".tmp")
        os.close(handle)
        try:
            save_file(tensors, name, metadata={"format": _FORMAT, "generation": str(chunk.generation)})
            os.replace(name, file)
        except (OSError, SafetensorError) as full:
            raise StoreError(f"cannot write a chunk of {chunk.nbytes} bytes to {self.root}: {full}") from None
        finally:
            Path(name).unlink(missing_ok=True)
        self.stats.puts += 1
        self.stats.bytes_written += chunk.nbytes

    def __len__(self) -> int:
        return sum(1 for _ in self.root.glob("*.safetensors"))

    @property
    def nbytes(self) -> int:
        return sum(f.stat().st_size for f in self.root.glob("*.safetensors"))
