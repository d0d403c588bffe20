"""A passage's KV as a folder: keys.safetensors, values.safetensors, valid_mask.safetensors, metadata.json.

keys: `keys` [layers, tokens, kv_heads, head_dim] and `positions` [tokens]; values: `values`, of the keys' shape;
valid_mask: `valid_mask` [tokens], bool. A placeholder has no keys and values, and no valid token. The metadata is
written last: a folder without it is incomplete.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cacheslide.core.keys import ChunkKey
from cacheslide.errors import DataError, StoreError
from cacheslide.plain_values import read_json
from cacheslide.store.base import ChunkKV
from harness.results.records import write_json
from harness.tasks.passages import PassageRow

SCHEMA = "cacheslide.rag.chunk/1"
_SAFE = re.compile(r"\w[\w.-]{0,99}", re.ASCII)


@dataclass(frozen=True)
class SavedChunk:
    """A folder's content; `chunk` is None for a placeholder."""

    chunk: ChunkKV | None
    metadata: dict[str, Any]


def chunk_folder(root: Path, row: PassageRow, passage: int) -> Path:
    """The folder of a sample's passage: its id, or its hash where the id is no file name, and the passage's index."""
    name = row.id if _SAFE.fullmatch(row.id) else row.sha256[:32]
    return root / f"{name}_{passage}"


def save_chunk(folder: Path, key: ChunkKey, tokens: int, chunk: ChunkKV | None, about: dict[str, Any]) -> int:
    """Write a chunk of `tokens` tokens, or a placeholder if `chunk` is None; returns the bytes of its tensors.

    `about` is added to the metadata. An older folder of that name is replaced; StoreError if it cannot be written.
    """
    tensors = {"valid_mask": {"valid_mask": torch.full((tokens,), chunk is not None)}}
    if chunk is not None:
        tensors["keys"] = {"keys": chunk.k.cpu().contiguous(), "positions": chunk.positions.cpu().contiguous()}
        tensors["values"] = {"values": chunk.v.cpu().contiguous()}
    metadata = {"schema": SCHEMA, "key": key, "tokens": tokens, "placeholder": chunk is None, **about}
    if chunk is not None:
        metadata |= {"generation": chunk.generation, "dtype": str(chunk.k.dtype).removeprefix("torch.")}
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        for name, content in tensors.items():
            save_file(content, folder / f"{name}.safetensors")
        write_json(folder / "metadata.json", metadata)
    except (OSError, SafetensorError, DataError) as full:
        raise StoreError(f"cannot write the chunk {folder}: {full}") from None
    return sum(x.numel() * x.element_size() for content in tensors.values() for x in content.values())


def load_chunk(folder: Path, key: ChunkKey) -> SavedChunk:
    """Read a folder; StoreError in one line if it is missing, damaged, or of another chunk, model or system."""
    if not (folder / "metadata.json").is_file():
        raise StoreError(f"{folder}: no chunk there")
    try:
        metadata = read_json(folder / "metadata.json", StoreError)
        if not isinstance(metadata, dict) or metadata.get("schema") != SCHEMA:
            raise StoreError("no metadata of a chunk")
        if metadata.get("key") != key:
            raise StoreError("of another text, model, dtype or system")
        mask = load_file(folder / "valid_mask.safetensors")["valid_mask"]
        if len(mask) != metadata["tokens"]:
            raise StoreError("its mask and its metadata disagree")
        if metadata["placeholder"]:
            return SavedChunk(None, metadata)
        if not bool(mask.all()):
            raise StoreError("some of its tokens are not valid")
        keys, values = load_file(folder / "keys.safetensors"), load_file(folder / "values.safetensors")
        return SavedChunk(
            ChunkKV(keys["keys"], values["values"], keys["positions"], generation=int(metadata["generation"])), metadata
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, StoreError) as broken:
        raise StoreError(f"{folder}: cannot be used ({broken})") from None
