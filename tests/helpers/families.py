"""Small random checkpoints of every family that the reference host computes, and what transformers says of them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from tests.helpers.checkpoints import SHAPE, save_random

WINDOW = 16
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOWS = {"use_sliding_window": True, "sliding_window": WINDOW}
TWO_ROPES = {
    FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
    SLIDING: {"rope_type": "default", "rope_theta": 2e4},
}
TYPES = [SLIDING, FULL, FULL, SLIDING, FULL]
# The family of each checkpoint, and what is changed of `SHAPE`.
FAMILIES = {
    "llama": ("llama", {}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "mistral-whole": ("mistral", {"sliding_window": None, "num_key_value_heads": 4}),
    "qwen2": ("qwen2", {}),
    "qwen2-windows": ("qwen2", {**WINDOWS, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"num_key_value_heads": 1}),
    "qwen3-windows": ("qwen3", {**WINDOWS, "sliding_window": 7, "layer_types": TYPES}),
    "gemma3": ("gemma3", {"sliding_window": WINDOW, "sliding_window_pattern": 3}),
    "gemma3-one-kv-head": (
        "gemma3",
        {
            "sliding_window": 5,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 31,
            "rope_parameters": TWO_ROPES,
            "layer_types": TYPES,
        },
    ),
}


def save_family(path: Path, name: str) -> Path:
    """The checkpoint called `name`."""
    kind, changes = FAMILIES[name]
    return save_random(path, kind, spread=0.2, initializer_range=0.12, **changes)


def theirs(path: Path, ids: Sequence[int]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """transformers' logits [T, vocab_size], and every layer's keys and values [T, kv_heads, head_dim], in float32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        # A cache that knows no windows keeps the keys of all tokens.
        out = model(torch.tensor([ids]), past_key_values=DynamicCache(), use_cache=True)
    layers = [(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in out.past_key_values.layers]
    return out.logits[0], layers


assert SHAPE["num_hidden_layers"] == 5  # as many as the lists of layer types above name
