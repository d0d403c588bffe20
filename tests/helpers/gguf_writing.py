"""Writes the random checkpoints of the tests as GGUF files, in llama.cpp's names and layouts."""

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import load_file

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def their_name(name: str, kind: str) -> str:
    stem, ending = name.rsplit(".", 1)
    if stem in NAMES:
        return f"{NAMES[stem]}.{ending}"
    _, _, layer, part = stem.split(".", 3)
    after = {"post_attention_layernorm": "post_attention_norm" if kind == "gemma3" else "ffn_norm"}
    return f"blk.{layer}.{(NAMES | after)[part]}.{ending}"


def write_gguf(
    folder: Path, kind: str, types: dict | None = None, extra: dict | None = None, vocabulary=None, **metadata
) -> Path:
    """A checkpoint's folder as llama.cpp's converter writes it.

    `types` are by the end of a tensor's name, others are F32; a type may come with the tensor's own bytes, uint8
    [out, bytes]. `extra` are further tensors, `vocabulary` is a `Vocabulary`, `metadata` pairs of a value and its type.
    """
    raw = json.loads((folder / "config.json").read_text())
    path = folder / f"{kind}.gguf"
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_key_length(raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    writer.add_rope_freq_base(1e6 if kind == "gemma3" else 1e4)
    if kind == "gemma3":
        writer.add_sliding_window(raw["sliding_window"])
        if "sliding_window_pattern" in raw:
            writer.add_uint32("gemma3.attention.sliding_window_pattern", raw["sliding_window_pattern"])
    if vocabulary is not None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(vocabulary.pieces)
        writer.add_token_scores(vocabulary.scores)
        writer.add_token_types(vocabulary.types)
        writer.add_bos_token_id(vocabulary.bos)
        writer.add_eos_token_id(vocabulary.eos)
        writer.add_unk_token_id(vocabulary.unk)
        writer.add_pad_token_id(vocabulary.pad)
        writer.add_add_space_prefix(False)
    for key, value in metadata.items():
        writer.add_key_value(f"{kind}.{key.replace('__', '.')}", *value)
    for name, tensor in load_file(folder / "model.safetensors").items():
        weight = tensor.float().numpy()
        if kind == "gemma3" and name.endswith("norm.weight"):
            weight = weight + 1
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = raw["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
            weight = halves.swapaxes(1, 2).reshape(weight.shape)
        kept = next((t for end, t in (types or {}).items() if their_name(name, kind).endswith(end)), "F32")
        kept, data = kept if isinstance(kept, tuple) else (kept, None)
        quantised = gguf.GGMLQuantizationType[kept]
        if data is None:
            data = np.ascontiguousarray(weight) if kept == "F32" else gguf.quants.quantize(weight, quantised)
        writer.add_tensor(their_name(name, kind), data, raw_dtype=quantised)
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
