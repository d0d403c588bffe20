"""Refuses unsupported configurations when the engine starts, by name and with the reason."""

from functools import wraps
from typing import Any

from cacheslide.errors import ConfigError, ModelError
from cacheslide.positions.rope import KNOWN_ROPE_TYPES
from cacheslide.vllm import CONNECTOR
from cacheslide.vllm.cope.setting import ARCHITECTURE, KINDS, is_cope

# Fewer families than the reference host: windowed layers have KV caches of their own (`_check_cache`).
FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", ARCHITECTURE)
_CACHE_DTYPES = ("auto", "float16", "half", "bfloat16", "float32", "float")


_ENGINE: list[Any] = []  # KV transfer configuration of the engine whose connector is being created


def keep_connector() -> None:
    """Hook vLLM to record the connector it creates for an engine, and to refuse KV offloading, which replaces it.

    A connector that wraps others (MultiConnector, or a third party's) gives them a configuration that looks like an
    engine's own; only the recorded one tells them apart.
    """
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    plain, settled = KVConnectorFactory.create_connector, VllmConfig._post_init_kv_transfer_config

    def create_connector(cls, config, *args: Any, **kwargs: Any):
        _ENGINE.append(config.kv_transfer_config)
        try:
            return plain(config, *args, **kwargs)
        finally:
            _ENGINE.pop()

    @wraps(settled)
    def post_init(self):
        transfer, size = self.kv_transfer_config, self.cache_config.kv_offloading_size
        if transfer is not None and transfer.kv_connector == CONNECTOR and size is not None:
            raise ConfigError(
                "CacheSlide does not work with KV offloading (kv_offloading_size), which takes the connector's place: "
                "switch it off, or serve without the connector"
            )
        return settled(self)

    KVConnectorFactory.create_connector = classmethod(create_connector)
    VllmConfig._post_init_kv_transfer_config = post_init


def check_place(vllm_config: Any, checked: bool) -> None:
    """Raise ConfigError unless the connector is the engine's own and its requests are `checked` on arrival."""
    own, engine = vllm_config.kv_transfer_config, _ENGINE[-1] if _ENGINE else None
    holder = engine.kv_connector if engine is not None and engine is not own else None
    if own.kv_connector != CONNECTOR:
        holder = own.kv_connector
    if holder is not None:
        raise ConfigError(
            f"CacheSlide does not work inside {holder}: annotations would not be checked, and others would keep what "
            f"it computes by reuse as if it were exact; make {CONNECTOR} the engine's own kv_connector"
        )
    if not checked:
        raise ConfigError(
            "CacheSlide's plugin is not loaded (see VLLM_PLUGINS): annotations would reach the engine without a check"
        )


def check(vllm_config: Any, kv_cache_config: Any) -> None:
    """Raise ModelError or ConfigError for models and caches that would be served wrongly."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    architectures = list(model.architectures)
    if not architectures or architectures[0] not in FAMILIES:
        raise ModelError(f"CacheSlide does not serve {', '.join(architectures)} (known: {', '.join(FAMILIES)})")
    if not is_cope(model.hf_text_config):  # the rotation of a CoPE model's base is not used
        _check_rotation(model.hf_text_config)
    _check_model(model.hf_text_config)
    refusals = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "dual batch overlap": getattr(parallel, "enable_dbo", False),
        "LoRA": vllm_config.lora_config is not None,
        "speculative decoding": vllm_config.speculative_config is not None,
        "M-RoPE": model.uses_mrope,
        "pooling models": model.runner_type != "generate",
        "a kv_role other than kv_both": vllm_config.kv_transfer_config.kv_role != "kv_both",
        f"the KV cache type {vllm_config.cache_config.cache_dtype}": (
            vllm_config.cache_config.cache_dtype not in _CACHE_DTYPES
        ),
        "prefix_match_unit": getattr(vllm_config.cache_config, "prefix_match_unit", None) is not None,
        "prompt embeddings": getattr(model, "enable_prompt_embeds", False),
    }
    for feature, wanted in refusals.items():
        if wanted:
            raise ConfigError(f"CacheSlide does not work with {feature}: switch it off, or serve without the connector")
    _check_cache(kv_cache_config)


def _check_rotation(config: Any) -> None:
    rope = dict(getattr(config, "rope_parameters", None) or {})
    kind = rope.get("rope_type", "default")
    if kind not in KNOWN_ROPE_TYPES:
        raise ModelError(f"rope type {kind!r} is not supported (known: {', '.join(KNOWN_ROPE_TYPES)})")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("partial rotary embeddings are not supported")


def _check_model(config: Any) -> None:
    for name in ("llama_4_scaling", "ada_rms_norm_t_cond", "dual_chunk_attention_config", "qk_norm"):
        if getattr(config, name, None):
            raise ModelError(f"{name} is not supported")
    if not getattr(config, "is_causal", True):
        raise ModelError("bidirectional attention is not supported")


def check_cope(vllm_config: Any) -> None:
    """Raise ModelError or ConfigError for options that a CoPE model does not support, connector or not."""
    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    config = model.hf_config
    if config.model_type not in KINDS:
        raise ModelError(f"CoPE serves {' and '.join(KINDS)} models, not {config.model_type}")
    _check_model(config)
    own_dtype = str(model.dtype).removeprefix("torch.")
    refusals = {
        f"{model.quantization} quantisation": vllm_config.quant_config is not None,
        f"the KV cache type {cache.cache_dtype}": cache.cache_dtype not in ("auto", own_dtype),
        "sliding windows": cache.sliding_window is not None or model.get_sliding_window() is not None,
        "speculative decoding": vllm_config.speculative_config is not None,
        "LoRA": vllm_config.lora_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "dual batch overlap": getattr(parallel, "enable_dbo", False),
        "prompt embeddings": getattr(model, "enable_prompt_embeds", False),
    }
    for feature, wanted in refusals.items():
        if wanted:
            raise ConfigError(f"a CoPE model does not work with {feature}: switch it off, or serve without the adapter")


def _check_cache(kv_cache_config: Any) -> None:
    groups = kv_cache_config.kv_cache_groups
    specs = {type(g.kv_cache_spec).__name__ for g in groups}
    if len(groups) != 1 or specs != {"FullAttentionSpec"}:
        raise ModelError(f"one group of full-attention layers is needed, not {len(groups)} of {', '.join(specs)}")
    spec = groups[0].kv_cache_spec
    if spec.sliding_window is not None or spec.attention_chunk_size is not None:
        raise ModelError("sliding-window and chunked attention are not supported")


def check_spans(find_spans: bool, slots: int) -> None:
    """Raise ConfigError if a server finds spans itself with a CoPE model that has `slots` calibrated slots."""
    if find_spans and slots:
        raise ConfigError("found spans follow no template, which calibrated slot offsets need: start with --cope-live")
