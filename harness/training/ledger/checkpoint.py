"""Checkpoints of the ledger model: a Qwen3 folder to serve, and the state to resume a run."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from cacheslide.errors import ConfigError
from harness.training.ledger.model import EPS, LedgerModel, Size, plain_weights
from harness.training.tokenizer import save_tokenizer

MODEL, STATE = "model.safetensors", "training-state.safetensors"


def export(model: LedgerModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the decoder in bf16 with its configuration and tokenizer, as transformers and vLLM read them."""
    save_tokenizer(tokenizer, folder)
    told = {"config.json": config(model.size), "generation_config.json": generation()}
    for name, content in told.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    weights = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in plain_weights(model).items()}
    _put(weights, folder / MODEL, {"format": "pt"})


def config(s: Size) -> dict:
    """The configuration of a Qwen3 of this size, in a form that transformers 4 and 5 read."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "torch_dtype": "bfloat16",
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "intermediate_size": s.ff,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "max_position_embeddings": s.positions,
        "rms_norm_eps": EPS,
        "rope_theta": s.theta,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def generation() -> dict:
    """Generation settings: an answer is two words and the end token."""
    return {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False, "max_new_tokens": 4}


def save_state(model: LedgerModel, optimizer: torch.optim.Optimizer, folder: Path, told: dict[str, str]) -> None:
    """Write parameters and moments in float32, and the run's progress `told` as text."""
    tensors = {f"parameter.{n}": p.detach().cpu() for n, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"{key}.{name}"] = value.detach().cpu().reshape(value.shape or (1,))
    _put({k: v.contiguous() for k, v in tensors.items()}, folder / STATE, told)


def load_state(model: LedgerModel, optimizer: torch.optim.Optimizer, folder: Path) -> dict[str, str]:
    """Read a state of `save_state`; returns its text. ConfigError when it does not fit the model."""
    try:
        with safe_open(folder / STATE, "pt") as file:
            tensors, told = {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as broken:
        raise ConfigError(f"{folder / STATE} cannot be read: {broken}") from None
    for name, p in model.named_parameters():
        kept = tensors.get(f"parameter.{name}")
        if kept is None or kept.shape != p.shape:
            raise ConfigError(f"{folder / STATE} is of another model: {name} does not fit")
        p.data.copy_(kept)
        moments = {k: tensors[f"{k}.{name}"] for k in ("exp_avg", "exp_avg_sq") if f"{k}.{name}" in tensors}
        if moments:
            step = tensors[f"step.{name}"].reshape(())
            # A fused optimizer counts its steps on the device.
            fused = bool(optimizer.param_groups[0].get("fused"))
            optimizer.state[p] = {k: v.to(p.device) for k, v in moments.items()}
            optimizer.state[p]["step"] = step.to(p.device) if fused else step
    return told


def _put(tensors: dict[str, torch.Tensor], path: Path, told: dict[str, str]) -> None:
    """Write a file atomically, readable by all users."""
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata=told)
    partial.chmod(0o644)
    os.replace(partial, path)
