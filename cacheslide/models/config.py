"""Reads a Hugging Face config.json of the Llama family and refuses, by name, what the engine would get wrong."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cacheslide.errors import ModelError
from cacheslide.plain_values import read_json

SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM")


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama-family decoder. Sizes are counts; `rope_scaling` is the checkpoint's own dict or None."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None = None
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelError(f"{self.num_heads} heads cannot share {self.num_kv_heads} KV heads evenly")

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "LlamaConfig":
        """From the parsed config.json, in the spelling of transformers 4 (rope_theta) or 5 (rope_parameters)."""
        kinds = raw.get("architectures") or [raw.get("model_type", "unknown")]
        if kinds[0] not in SUPPORTED:
            raise ModelError(f"model kind {kinds[0]} is not supported (known: {', '.join(SUPPORTED)})")
        for key, want in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
            if raw.get(key, want) != want:
                raise ModelError(f"{key}={raw[key]!r} is not supported (only {want!r})")
        if raw.get("quantization_config"):
            raise ModelError("quantised checkpoints are not supported by the reference model")
        rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        theta = float(rope.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0)
        try:
            heads, hidden, window = raw["num_attention_heads"], raw["hidden_size"], raw.get("sliding_window")
            longest = raw.get("max_position_embeddings", 2048)
            return cls(
                num_layers=raw["num_hidden_layers"],
                hidden_size=hidden,
                intermediate_size=raw["intermediate_size"],
                num_heads=heads,
                num_kv_heads=raw.get("num_key_value_heads") or heads,
                head_dim=raw.get("head_dim") or hidden // heads,
                vocab_size=raw["vocab_size"],
                # Below the window, sliding-window attention is plain causal attention: the window is our limit.
                max_positions=min(longest, window) if window else longest,
                rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
                rope_theta=theta,
                rope_scaling=rope or None,
                tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            )
        except KeyError as missing:
            raise ModelError(f"config.json lacks {missing.args[0]!r}") from None

    @classmethod
    def from_pretrained(cls, path: Path) -> "LlamaConfig":
        """From `path`/config.json."""
        file = Path(path) / "config.json"
        if not file.is_file():
            raise ModelError(f"no model at {path}: config.json is missing")
        return cls.from_dict(read_json(file, ModelError))
