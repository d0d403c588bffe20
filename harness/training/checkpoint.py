"""Checkpoints: a Hugging Face Llama directory, with the training-only parts for a later `--init`."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import LlamaConfig

from harness.training.model import Trainee
from harness.training.tokenizer import save_tokenizer

SHARD = 15 * 2**20
EXTRAS = "training-parts.safetensors"


def save(model: Trainee, tokenizer: Tokenizer, folder: Path, new_tokens: int = 4) -> None:
    """Write the model in bf16 as shards of at most 15 MiB, its tokenizer, and the training-only parts."""
    save_tokenizer(tokenizer, folder)
    (folder / "config.json").write_text(json.dumps(_config(model.lm.config), indent=2) + "\n")
    generation = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "do_sample": False,
        "max_new_tokens": new_tokens,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    weights = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in model.lm.state_dict().items()}
    if model.lm.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)  # tied: loaders take the embeddings
    shards, size = [{}], 0
    for name, tensor in weights.items():
        if size + tensor.nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in weights.values())},
        "weight_map": {k: name for name, shard in zip(names, shards, strict=True) for k in shard},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    extras = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file({k: v for k, v in extras.items() if not k.startswith("lm.")}, folder / EXTRAS)


def _config(c: LlamaConfig) -> dict:
    """The configuration in the form that both transformers 4 and 5 read, and vLLM."""
    kept = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "max_position_embeddings rms_norm_eps tie_word_embeddings bos_token_id eos_token_id pad_token_id hidden_act"
    )
    fixed = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    return fixed | {k: getattr(c, k) for k in kept.split()} | {"rope_theta": 10000.0}


def load(model: Trainee, folder: Path) -> None:
    """Read a checkpoint that `save` wrote. Missing training-only parts keep their initial values."""
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        weights.update({f"lm.{k}": v for k, v in load_file(path).items()})
    if model.lm.config.tie_word_embeddings:
        weights["lm.lm_head.weight"] = weights["lm.model.embed_tokens.weight"]
    extras = load_file(folder / EXTRAS) if (folder / EXTRAS).exists() else {}
    missing = model.load_state_dict(weights | extras, strict=False)
    lost = [k for k in missing.missing_keys if k.startswith("lm.")]
    if lost or missing.unexpected_keys:
        raise ValueError(f"{folder} does not fit the model: missing {lost[:3]}, unknown {missing.unexpected_keys[:3]}")
