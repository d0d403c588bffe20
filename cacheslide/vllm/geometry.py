"""The engine in numbers that a scheduler needs: it has no model, but it names chunks and knows what they weigh."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from cacheslide.positions.ccpe import PromptSlots, check_slots, slots_in
from cacheslide.prompt import Prompt
from cacheslide.vllm.cope_setting import is_cope, setup_of


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
    slots: int = 0  # updated slots that a CoPE model's Γ was calibrated for

    @classmethod
    def of(cls, vllm_config) -> "Geometry":
        """From vLLM's configuration."""
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        config = model.hf_text_config
        cope = setup_of(config) if is_cope(config) else None
        return cls(
            model_id=weights_id(model.model, model.revision, str(config.to_dict()))
            + (f" {cope.digest}" if cope else ""),
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
        """The slots that a CoPE model crosses by their calibrated masses; PromptError when Γ has too few."""
        if not self.slots:
            return None
        slots = slots_in(prompt)
        check_slots(slots, self.slots)
        return slots if slots.bounds else None

    def chunk_bytes(self, rows: int, probes: int) -> int:
        """Bytes of one rank's chunk of `rows` rows with the inputs of `probes` layers."""
        kv = 2 * self.num_layers * self.kv_heads * self.head_dim
        return rows * ((kv + probes * self.hidden_size) * self.itemsize + torch.int64.itemsize)


def weights_id(path: str, revision: str | None, config: str) -> str:
    """Names the weights in chunk keys: configuration, revision, and each weight file's name, size and time.

    Not a hash of their content, as in `cacheslide.model.weights.fingerprint`: chunks live no longer than the process
    that loaded these files, and hashing a large model would delay its start by minutes.
    """
    h = hashlib.sha256(f"{path}\0{revision}\0{config}".encode())
    folder = Path(path)
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        stat = file.stat()
        h.update(f"\0{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return h.hexdigest()
