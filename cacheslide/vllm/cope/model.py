"""Llama and Mistral with a CoPE adapter as a vLLM model: LoRA merged on loading, no rotation, CoPE attention."""

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.platforms import current_platform

from cacheslide.errors import ConfigError, ModelError
from cacheslide.vllm.cope.backend import CopeBackend
from cacheslide.vllm.cope.setting import setup_of
from cacheslide.vllm.cope.slots import LayerOffsets
from cacheslide.vllm.geometry import fingerprint_of
from cacheslide.vllm.support import check_cope


class Unrotated(nn.Module):
    """Replaces a rotary embedding by the identity."""

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Returns query and key unchanged."""
        return query, key


class CopeAttention(LlamaAttention):
    """Llama's projections around CoPE attention."""

    def __init__(self, *args, cache_config=None, quant_config=None, prefix: str = "", **kwargs) -> None:
        super().__init__(*args, cache_config=cache_config, quant_config=quant_config, prefix=prefix, **kwargs)
        # Llama does not let the backend be chosen: its attention layer is replaced by one of the same name.
        del get_current_vllm_config().compilation_config.static_forward_context[self.attn.layer_name]
        self.attn = Attention(
            self.num_heads,
            self.head_dim,
            self.scaling,
            num_kv_heads=self.num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=self.attn.sliding_window,
            prefix=self.attn.layer_name,
            attn_backend=CopeBackend,
        )

    def _init_rotary_emb(self, config, quant_config) -> None:
        self.rotary_emb = Unrotated()


class CopeDecoderLayer(LlamaDecoderLayer):
    """A Llama layer with CoPE attention. Mistral's is the same, given what `check_cope` refuses."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config=None) -> None:
        super().__init__(vllm_config, prefix, config, attn_layer_type=CopeAttention)


class CacheSlideCopeForCausalLM(LlamaForCausalLM):
    """The base model with the adapter named in its configuration (see `cope/setting.py`, `overrides`).

    Position tables are replicated on all ranks; projections and heads are split as in the base model.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        model = vllm_config.model_config
        check_cope(vllm_config)
        setup = setup_of(model.hf_config)
        if setup.slot_offsets is not None and current_platform.is_cuda() and not vllm_config.use_v2_model_runner:
            # Full graphs of decoding batches would treat a prompt's last row as a decoded one, which crosses no slot.
            raise ConfigError(
                "calibrated slot offsets need vLLM's second model runner on a GPU: start with --cope-live"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=CopeDecoderLayer)
        self.setup, self.source = setup, (model.model, model.revision)
        dtype, offsets = torch.get_default_dtype(), self._layer_offsets()
        for i, layer in enumerate(self.model.layers):
            table = setup.adapter.positions(i)
            if table.shape[1] != layer.self_attn.head_dim:
                raise ModelError(f"position tables {tuple(table.shape)} do not fit heads of {layer.self_attn.head_dim}")
            device = layer.input_layernorm.weight.device
            attention = layer.self_attn.attn
            attention.register_buffer("cope_positions", table.to(device, dtype), persistent=False)
            attention.cope_layer, attention.cope_offsets = i, offsets

    def _layer_offsets(self) -> LayerOffsets:
        """Γ of this rank's heads."""
        attention, offsets = self.model.layers[0].self_attn, self.setup.slot_offsets
        if offsets is None:
            return LayerOffsets()
        if (offsets.shape[0], offsets.shape[2]) != (len(self.model.layers), attention.total_num_heads):
            raise ModelError(f"slot offsets {tuple(offsets.shape)} do not fit the model's layers and heads")
        first = get_tensor_model_parallel_rank() * attention.num_heads
        rank_offsets = offsets[:, :, first : first + attention.num_heads]
        device = self.model.layers[0].input_layernorm.weight.device
        return LayerOffsets(rank_offsets.to(device, torch.float32).contiguous(), self.setup.cap)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the base's weights plus LoRA; ModelError unless the adapter was trained on these weights."""
        weights = iter(weights)
        first = next(weights)  # downloads finish here
        if get_tensor_model_parallel_rank() == 0:  # hashing takes seconds: one rank suffices
            self.setup.adapter.check_base(fingerprint_of(*self.source), self.source[0])
        missing = self.setup.adapter.changes
        loaded = super().load_weights(self._merged(chain([first], weights), missing))
        if missing:
            raise ModelError(f"the adapter changes {min(missing)}, which the checkpoint lacks")
        return loaded

    def _merged(self, weights: Iterable[tuple[str, Tensor]], missing: dict[str, str]) -> Iterable[tuple[str, Tensor]]:
        for name, weight in weights:
            stem = missing.pop(name, None)
            yield name, weight if stem is None else self.setup.adapter.merge(stem, weight)
