"""Small random checkpoints of every kind of model, and CoPE adapters for them."""

from pathlib import Path

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cacheslide.models.weights import fingerprint
from cacheslide.training.adapter import AdapterSettings, CopeAdapter, save_adapter

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
}


def save_random(path: Path, kind: str = "llama", spread: float = 0.0, **changes) -> Path:
    """A random checkpoint of `kind` in Hugging Face format; weights large enough for contexts to matter.

    With `spread`, norms and biases are random as well, by that deviation: transformers begins them at one value.
    """
    torch.manual_seed(7)
    config, model = KINDS[kind]
    made = model(config(**(SHAPE | changes)))
    with torch.no_grad():
        for x in made.parameters() if spread else ():
            if x.dim() == 1:
                x += spread * torch.randn(x.shape)
    made.save_pretrained(path)
    return path


def save_random_adapter(path: Path, checkpoint: Path, rank: int = 3, p_max: int = 9, tables: float = 0.3) -> Path:
    """A random CoPE adapter for `checkpoint` in the folder `path`: LoRA on every projection, tables that matter."""
    config, g, tensors = LlamaConfig.from_pretrained(checkpoint), torch.Generator().manual_seed(4), {}
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    hidden = config.hidden_size
    sizes = {"q_proj": (hidden, q), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (q, hidden)}
    for i in range(config.num_hidden_layers):
        for name, (into, out) in sizes.items():
            tensors[f"layers.{i}.{name}.a"] = torch.randn(rank, into, generator=g) * 0.1
            tensors[f"layers.{i}.{name}.b"] = torch.randn(out, rank, generator=g) * 0.1
        tensors[f"layers.{i}.positions"] = torch.randn(p_max, config.head_dim, generator=g) * tables
    save_adapter(CopeAdapter(AdapterSettings(rank, 2.0 * rank, p_max), fingerprint(checkpoint), tensors), path)
    return path
