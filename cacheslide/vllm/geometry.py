"""Sizes of the engine for the scheduler side, which has no model but names chunks and computes their bytes."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cacheslide.core.prompt import Prompt
from cacheslide.errors import CacheSlideError, ConfigError
from cacheslide.models.weights import fingerprint
from cacheslide.positions.ccpe import PromptSlots, check_slots, slots_in
from cacheslide.vllm.cope.setting import ADAPTER, is_cope, setup_of


@dataclass(frozen=True)
class Geometry:
    """Layers, this rank's KV heads, sizes in elements, `itemsize` in bytes."""

    model_id: str
    dtype: str
    num_layers: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    itemsize: int
    max_positions: int
    slots: int = 0  # number of updated slots that a CoPE model's Γ was calibrated for

    @classmethod
    def of(cls, vllm_config, by_content: bool = False) -> "Geometry":
        """From vLLM's configuration; with `by_content` the weights' id is equal in all processes (`content_id`)."""
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        config = model.hf_text_config
        cope = setup_of(config) if is_cope(config) else None
        if by_content:
            dummy = vllm_config.load_config.load_format == "dummy"
            name = content_id(model.model, model.revision, config.to_dict(), model.quantization, dummy)
        else:
            name = weights_id(model.model, model.revision, str(config.to_dict()))
        return cls(
            model_id=name + (f" {cope.digest}" if cope else ""),
            dtype=str(model.dtype),
            num_layers=model.get_num_layers(parallel),
            kv_heads=model.get_num_kv_heads(parallel),
            head_dim=model.get_head_size(),
            hidden_size=config.hidden_size,
            itemsize=torch.empty(0, dtype=model.dtype).element_size(),
            max_positions=max(model.max_model_len, config.max_position_embeddings),
            slots=cope.slots if cope else 0,
        )

    def slots_of(self, prompt: Prompt) -> PromptSlots | None:
        """The slots that a CoPE model crosses by their calibrated offsets; PromptError for too many."""
        if not self.slots:
            return None
        slots = slots_in(prompt)
        check_slots(slots, self.slots)
        return slots if slots.bounds else None

    def chunk_bytes(self, rows: int, probes: int, scores: bool = False) -> int:
        """Bytes of one rank's chunk of `rows` rows, with the inputs of `probes` layers and, if `scores`, its scores."""
        kv = 2 * self.num_layers * self.kv_heads * self.head_dim
        beside = torch.int64.itemsize + scores * torch.float32.itemsize
        return rows * ((kv + probes * self.hidden_size) * self.itemsize + beside)


def weights_id(path: str, revision: str | None, config: str) -> str:
    """The weights' id in chunk keys, from configuration, revision, and each weight file's name, size and time.

    It is no hash of the content: only for chunks that do not outlive the process which loaded these files. Shared or
    persistent chunks need `content_id`.
    """
    h = hashlib.sha256(f"{path}\0{revision}\0{config}".encode())
    folder = Path(path)
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        stat = file.stat()
        h.update(f"\0{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return h.hexdigest()


def content_id(
    path: str, revision: str | None, config: Mapping[str, Any], quantization: str | None, dummy: bool
) -> str:
    """The weights' id by content: equal on every host, different for other weights.

    Reads the checkpoint once, about a second a gigabyte. `dummy` weights are identified by the configuration. A CoPE
    adapter's folder is not hashed: its content has its own digest.
    ConfigError if the files cannot be found.
    """
    shape = {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version", ADAPTER)}
    h = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode())
    h.update(f"\0{quantization}\0{'dummy' if dummy else fingerprint_of(path, revision)}".encode())
    return h.hexdigest()


def fingerprint_of(path: str, revision: str | None) -> str:
    """`fingerprint` of a folder, or of a model in the hub's cache."""
    try:
        if Path(path).is_dir():
            return fingerprint(Path(path))
        from huggingface_hub import snapshot_download

        return fingerprint(Path(snapshot_download(path, revision=revision, local_files_only=True)))
    except (CacheSlideError, OSError, ValueError) as missing:
        raise ConfigError(f"chunks shared through a store are named by the weights' content: {missing}") from None
