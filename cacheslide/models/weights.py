"""Reads checkpoints: safetensors, in one file or in shards with an index, or GGUF."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cacheslide.errors import ConfigError, ModelError
from cacheslide.models.config import DecoderConfig
from cacheslide.models.families import parse_config, read_config
from cacheslide.models.gguf_file import GgufFile, is_gguf
from cacheslide.plain_values import read_json, shown


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of the checkpoint folder `path`."""
    path = Path(path)
    index = path / "model.safetensors.index.json"
    files = [path / name for name in _indexed(index)] if index.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError(f"no weights in {path}: expected model.safetensors or model.safetensors.index.json")
    for file in files:
        if not file.is_file():
            raise ModelError(f"weights are incomplete: {file.name} is missing from {path}")
    return files


def _indexed(index: Path) -> list[str]:
    """The files that an index names; they lie beside it."""
    raw = read_json(index, ModelError)
    files = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(files, dict):
        raise ModelError(f"{index} has no weight_map: an object of a file's name by tensor is expected")
    for name in files.values():
        if not isinstance(name, str) or not name.isprintable() or Path(name).name != name:
            raise ModelError(f"{index}: a file's name is expected, not {shown(name)}")
    return sorted(set(files.values()))


def check_device(device: str) -> None:
    """Raise ConfigError for a device that PyTorch does not know or cannot use."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as refused:  # PyTorch without CUDA raises AssertionError
        why = str(refused).strip().splitlines()[0]
        raise ConfigError(f"device {device!r} cannot be used: {why}") from None


def load_checkpoint(path: Path, dtype: torch.dtype, device: str) -> tuple[DecoderConfig, dict[str, Tensor]]:
    """Configuration and weights of a checkpoint folder or a GGUF file."""
    check_device(device)
    if is_gguf(path):
        file = GgufFile(path)
        return parse_config(file.config), file.tensors(dtype, device)
    return read_config(path), load_weights(path, dtype, device)


def load_weights(path: Path, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """All tensors of the checkpoint folder, converted to `dtype` on `device`."""
    out: dict[str, Tensor] = {}
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt", device="cpu") as f:
                for name in f.keys():  # noqa: SIM118 (safe_open is no mapping)
                    out[name] = _plain(f.get_tensor(name), name, file).to(device=device, dtype=dtype)
        except SafetensorError as broken:
            raise ModelError(f"{file.name} cannot be read: {broken}") from None
    return out


def _plain(tensor: Tensor, name: str, file: Path) -> Tensor:
    """The tensor; ModelError for a quantised dtype, whose values need scales stored elsewhere."""
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ModelError(f"{file.name}: {name} is of type {kind}: quantised weights are not supported")
    return tensor


def fingerprint(path: Path) -> str:
    """SHA-256 over config.json and the weight files, or over a GGUF file: the model's part of every chunk key."""
    if is_gguf(path):
        return _sha256(Path(path)).hexdigest()
    config = Path(path) / "config.json"
    if not config.is_file():
        raise ModelError(f"no model at {path}: config.json is missing")
    h = hashlib.sha256(config.read_bytes())
    for file in weight_files(path):
        h.update(file.name.encode())
        _sha256(file, h)
    return h.hexdigest()


def _sha256(file: Path, into: Any = None) -> Any:
    """Hash a file blockwise into `into`, or into a new SHA-256 digest; returns the digest."""
    h = hashlib.sha256() if into is None else into
    with file.open("rb") as f:
        while block := f.read(1 << 22):
            h.update(block)
    return h
