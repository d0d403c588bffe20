"""Reads config.json of the supported Hugging Face families and refuses unsupported features by name.

The rules are those of transformers 5: defaults of missing keys, which layers have a sliding window, and each layer's
RoPE base. transformers 4 spells some keys differently (`rope_theta`, `rope_local_base_freq`,
`sliding_window_pattern`); both spellings are read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cacheslide.errors import ModelError
from cacheslide.models.config import DecoderConfig, Rope, check_count
from cacheslide.plain_values import read_json, shown

Raw = Mapping[str, Any]
FULL, SLIDING = "full_attention", "sliding_attention"
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Family:
    """Properties of an architecture that config.json does not give.

    Attributes
    ----------
    activation : tuple of str
        The key of the MLP's activation, and its only supported value.
    defaults : mapping
        Values that transformers uses for missing keys.
    slides : callable
        Whether layer i has a sliding window when config.json has no `layer_types`.
    typed : bool
        Whether transformers reads `layer_types`.
    thetas : mapping
        Default RoPE base by layer type.
    traits : mapping
        Fields of `DecoderConfig` that the architecture determines.
    scaled : bool
        Embeddings are multiplied by sqrt(hidden_size), scores by 1 / sqrt(`query_pre_attn_scalar`).
    """

    activation: tuple[str, str] = ("hidden_act", "silu")
    defaults: Raw = field(default_factory=dict)
    slides: Callable[[Raw, int], bool] = lambda raw, i: False
    typed: bool = False
    thetas: Mapping[str, float] = field(default_factory=lambda: {FULL: 1e4, SLIDING: 1e4})
    traits: Raw = field(default_factory=dict)
    scaled: bool = False


def _above(raw: Raw, i: int) -> bool:
    """Whether Qwen's layer i has a window: those from `max_window_layers` on, if windows are switched on."""
    return bool(raw["use_sliding_window"]) and raw["sliding_window"] is not None and i >= raw["max_window_layers"]


_QWEN: Raw = {
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA3: Raw = {
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
}

FAMILIES = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(
        defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        slides=lambda raw, i: raw["sliding_window"] is not None,
    ),
    "Qwen2ForCausalLM": Family(defaults=_QWEN, slides=_above, typed=True, traits={"qkv_bias": True}),
    "Qwen3ForCausalLM": Family(
        defaults={**_QWEN, "head_dim": 128}, slides=_above, typed=True, traits={"qk_norm": True}
    ),
    "Gemma3ForCausalLM": Family(
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        defaults=_GEMMA3,
        slides=lambda raw, i: (i + 1) % raw["sliding_window_pattern"] != 0,
        typed=True,
        thetas={FULL: 1e6, SLIDING: 1e4},
        traits={"qk_norm": True, "sandwich_norms": True, "unit_offset_norms": True},
        scaled=True,
    ),
}

# Unsupported features by key, and the values that switch them off.
_NOTHING = (None, False, 0, (), [], {})
_REFUSED = {
    "attention_bias": "a bias in every attention projection",
    "mlp_bias": "a bias in the MLP",
    "attn_logit_softcapping": "soft-capped attention",
    "final_logit_softcapping": "soft-capped logits",
    "use_bidirectional_attention": "bidirectional attention",
    "quantization_config": "quantised weights",
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "vision_config": "images",
    "audio_config": "sound",
}


def read_config(path: str | Path) -> DecoderConfig:
    """The configuration in `path`/config.json."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ModelError(f"no model at {path}: config.json is missing")
    return parse_config(read_json(file, ModelError))


def parse_config(raw: Raw) -> DecoderConfig:
    """The configuration in a parsed config.json; one-line ModelError for missing, invalid or unsupported values."""
    if not isinstance(raw, dict):
        raise ModelError(f"config.json holds no object but {type(raw).__name__}")
    kinds = raw.get("architectures") or [raw.get("model_type", "unknown")]
    if not isinstance(kinds, list):
        raise ModelError(f"architectures must be a list of names, not {shown(kinds)}")
    family = FAMILIES.get(str(kinds[0]))
    if family is None:
        raise ModelError(f"model kind {kinds[0]} is not supported (known: {', '.join(FAMILIES)})")
    _refuse(raw, family)
    # transformers treats null as its default, except where null is a value: only a window may be null.
    silent = {
        k: v for k, v in family.defaults.items() if raw.get(k) is None and (k != "sliding_window" or k not in raw)
    }
    raw = {**raw, **silent}
    try:
        heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
        layers = check_count("num_layers", raw["num_hidden_layers"])
        types = _layer_types(raw, family, layers)
        off = "use_sliding_window" in family.defaults and not raw["use_sliding_window"]
        window = None if off else raw.get("sliding_window")
        ropes = {kind: _rope(raw, family, kind) for kind in set(types)}
        if SLIDING in types and window is None:
            raise ModelError("layer_types asks for sliding attention, but no sliding_window says how far")
        scales: dict[str, Any] = {}
        if family.scaled:
            scales = {"embedding_scale": hidden**0.5, "attention_scale": raw["query_pre_attn_scalar"] ** -0.5}
        return DecoderConfig(
            num_layers=layers,
            hidden_size=hidden,
            intermediate_size=raw["intermediate_size"],
            num_heads=heads,
            num_kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or hidden // heads,
            vocab_size=raw["vocab_size"],
            max_positions=raw.get("max_position_embeddings") or 2048,
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            ropes=tuple(ropes[kind] for kind in types),
            windows=tuple(window if kind == SLIDING else None for kind in types),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            activation=_ACTIVATIONS[family.activation[1]],
            **family.traits,
            **scales,
        )
    except KeyError as missing:
        raise ModelError(f"config.json lacks {missing.args[0]!r}") from None
    except (TypeError, ValueError, ZeroDivisionError) as wrong:
        if isinstance(wrong, ModelError):
            raise
        raise ModelError(f"config.json holds a value of the wrong kind: {wrong}") from None


def _refuse(raw: Raw, family: Family) -> None:
    for key, feature in _REFUSED.items():
        if raw.get(key) not in _NOTHING:
            raise ModelError(f"{feature} ({key}={raw[key]!r}) is not supported by the reference model")
    key, want = family.activation
    if raw.get(key, want) != want:
        raise ModelError(f"{key}={raw[key]!r} is not supported (only {want!r})")
    _refuse_partial(raw)


def _refuse_partial(raw: Raw) -> None:
    factor = raw.get("partial_rotary_factor")
    if factor not in (None, 1):
        raise ModelError(f"a partial rotation (partial_rotary_factor={factor!r}) is not supported")


def _layer_types(raw: Raw, family: Family, layers: int) -> list[str]:
    """The attention type of every layer."""
    types = [SLIDING if family.slides(raw, i) else FULL for i in range(layers)]
    named = raw.get("layer_types")
    if named is None:
        return types
    unknown = sorted({str(kind) for kind in named} - {FULL, SLIDING})
    if unknown:
        raise ModelError(f"layers of type {', '.join(unknown)} are not supported (known: {FULL}, {SLIDING})")
    if not family.typed and named != types:
        raise ModelError("layer_types is not supported for this architecture: its layers are all alike")
    if len(named) != layers:
        raise ModelError(f"layer_types names {len(named)} layers, but the model has {layers}")
    return list(named)


def _rope(raw: Raw, family: Family, kind: str) -> Rope:
    """The rotation of a layer type, spelled as in transformers 4 (rope_theta) or 5 (rope_parameters)."""
    given, old = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    for key, value in {"rope_parameters": given, "rope_scaling": old}.items():
        if not isinstance(value, dict):
            raise ModelError(f"{key} must be an object, not {shown(value)}")
    two = family.thetas[FULL] != family.thetas[SLIDING]
    if any(isinstance(value, dict) for value in given.values()):
        given = dict(given.get(kind) or {})
    elif two and given:
        raise ModelError("rope_parameters must be given for each type of layer (full_attention, sliding_attention)")
    theta = raw.get("rope_local_base_freq" if two and kind == SLIDING else "rope_theta")
    rope = {**(old if kind == FULL or not two else {}), **given} if two else dict(given or old)
    _refuse_partial(rope)
    thetas = (rope.pop("rope_theta", None), theta, family.thetas[kind])
    theta = float(next(base for base in thetas if base is not None))
    return Rope(theta, rope if rope.get("rope_type", rope.get("type", "default")) != "default" else None)
