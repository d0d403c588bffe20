"""Reads a GGUF file as the Hugging Face checkpoint it was converted from: configuration, tensor names and layout.

The format is ggml's (github.com/ggml-org/ggml, docs/gguf.md), read and dequantised by the package `gguf`. Changes by
llama.cpp's converter are undone: Gemma's norms hold 1 + w, and Llama's query and key rows are interleaved for another
layout of the rotation.
"""

import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cacheslide.errors import ModelError

MAGIC = b"GGUF"
TYPES = ("F32", "F16", "BF16", "Q4_K", "Q5_0", "Q6_K", "Q8_0")
ARCHITECTURES = {
    "gemma3": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_MODEL_TYPES = {"gemma3": "gemma3_text"}  # other names are the same
# Keys of config.json by metadata keys, which follow the architecture's name.
_KEYS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "rope_local_base_freq": "rope.freq_base_swa",
    "num_local_experts": "expert_count",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "sliding_window": "attention.sliding_window",
    "sliding_window_pattern": "attention.sliding_window_pattern",
}
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_BIASED = ("attn_q", "attn_k", "attn_v")  # have a bias in Qwen2
# Only Gemma 3 27B scales its scores by a number other than head_dim; llama.cpp recognises it by its layer count.
_27B_LAYERS = 62


def is_gguf(path: str | Path) -> bool:
    """Whether `path` names a GGUF file, as opposed to a checkpoint folder."""
    return Path(path).suffix == ".gguf"


class GgufFile:
    """An open GGUF file.

    Parameters
    ----------
    path : str or Path

    Raises
    ------
    ModelError
        In one line, if the package `gguf` is missing, or the file is not GGUF, truncated, damaged, or not supported.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError:
            raise ModelError("reading GGUF needs the package gguf: pip install 'cacheslide[gguf]'") from None
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                start = file.read(len(MAGIC))
        except OSError as failed:
            raise ModelError(f"cannot read {path}: {failed.strerror}") from None
        if start != MAGIC:
            raise ModelError(f"{path} is no GGUF file: it starts with {start!r}, not {MAGIC!r}")
        # The package checks little of what it reads: a damaged file may raise any exception from numpy.
        self._reader = self._guarded(lambda: GGUFReader(self.path))
        self.architecture = str(self.value("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ModelError(f"{path}: architecture {self.architecture} is not supported (known: {known})")

    def _guarded(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except ModelError:
            raise
        except Exception as broken:
            why = (str(broken) or type(broken).__name__).splitlines()[0]
            raise ModelError(f"{self.path} cannot be read, it is cut short or damaged: {why}") from None

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata value as a plain Python object."""
        field = self._reader.fields.get(key)
        return default if field is None else self._guarded(field.contents)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's configuration in the form of config.json."""
        return self._guarded(self._read_config)

    def _read_config(self) -> dict[str, Any]:
        name = self.architecture
        config = {key: self.value(f"{name}.{gguf_key}") for key, gguf_key in _KEYS.items()}
        raw: dict[str, Any] = {k: v for k, v in config.items() if v is not None}
        raw["architectures"] = [ARCHITECTURES[name]]
        raw["rms_norm_eps"] = float(f"{raw.get('rms_norm_eps', 1e-6):.6g}")  # stored as float32
        kind = self.value(f"{name}.rope.scaling.type", "none")
        if kind != "none":
            raw["rope_scaling"] = {"rope_type": kind, "factor": self.value(f"{name}.rope.scaling.factor")}
        tensors = {t.name: t for t in self._reader.tensors}
        if "token_embd.weight" not in tensors:
            raise ModelError(f"{self.path} lacks the tensor 'token_embd.weight'")
        raw["vocab_size"] = int(tensors["token_embd.weight"].shape[1])
        raw["tie_word_embeddings"] = "output.weight" not in tensors
        if raw.get("head_dim") is None and raw.get("num_attention_heads"):
            raw["head_dim"] = raw.get("hidden_size", 0) // raw["num_attention_heads"]
        partial = self.value(f"{name}.rope.dimension_count", raw.get("head_dim"))
        if partial != raw.get("head_dim"):
            raw["partial_rotary_factor"] = partial / raw["head_dim"]
        if name == "gemma3":
            large = raw.get("num_hidden_layers") == _27B_LAYERS
            scale = raw["hidden_size"] // raw["num_attention_heads"] if large else raw.get("head_dim")
            raw |= {"query_pre_attn_scalar": scale, "hidden_activation": "gelu_pytorch_tanh"}
            raw = {"rope_local_base_freq": 1e4, "sliding_window_pattern": 6, **raw}  # llama.cpp's defaults
        return {**raw, "model_type": _MODEL_TYPES.get(name, name)}

    def tensors(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """All weights, dequantised, with Hugging Face's names and layout."""
        out = {}
        for tensor in self._reader.tensors:
            name = self._name(tensor.name)
            weight = self._restored(tensor.name, self._guarded(lambda t=tensor: self._dequantised(t)))
            out[name] = torch.from_numpy(weight).to(device=device, dtype=dtype)
        return out

    def _dequantised(self, tensor: Any) -> np.ndarray:
        """Float32 [out, in]; ModelError for values that are not finite, which mean a damaged file."""
        from gguf.quants import dequantize

        kind = tensor.tensor_type.name
        if kind not in TYPES:
            raise ModelError(
                f"{self.path}: {tensor.name} is of type {kind}, which is not supported ({', '.join(TYPES)})"
            )
        weight = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if weight.shape != tuple(int(n) for n in reversed(tensor.shape)) or not np.isfinite(weight).all():
            raise ModelError(
                f"{self.path} is damaged: {tensor.name} is of another shape, or holds values that are none"
            )
        return weight

    def _name(self, gguf_name: str) -> str:
        """The Hugging Face name of a GGUF tensor."""
        inner = {**_INNER, **(_GEMMA if self.architecture == "gemma3" else {})}
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", gguf_name)
        if gguf_name in _OUTER:
            return _OUTER[gguf_name]
        if layer is None or layer[2] not in inner or (layer[3] == "bias" and not self._has_bias(layer[2])):
            raise ModelError(f"{self.path}: the tensor {gguf_name} is not supported in {self.architecture} models")
        return f"model.layers.{layer[1]}.{inner[layer[2]]}.{layer[3]}"

    def _has_bias(self, part: str) -> bool:
        return self.architecture == "qwen2" and part in _BIASED

    def _restored(self, name: str, weight: np.ndarray) -> np.ndarray:
        """The weight with the changes by llama.cpp's converter undone."""
        if self.architecture == "gemma3" and name.endswith("norm.weight"):
            return weight - 1
        part = name.split(".")[-2]
        if self.architecture == "llama" and part in ("attn_q", "attn_k"):
            key = "num_attention_heads" if part == "attn_q" else "num_key_value_heads"
            heads = self.config.get(key) or self.config["num_attention_heads"]
            return self._guarded(lambda: _half_split(weight, heads))
        return weight


def _half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """Each head's rows, reordered from interleaved pairs to the half-split layout of Hugging Face's rotation."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)
