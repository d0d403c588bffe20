"""CoPE on a Hugging Face Llama or Mistral: LoRA by peft, attention by transformers' attention interface.

An attached model has two modes: with CoPE (no rotation, position tables, LoRA), and the base model bit for bit. The
backbone is frozen; LoRA factors and position tables are trained.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cacheslide.errors import ConfigError, ModelError
from cacheslide.kernels.cope.training import cope_attention
from cacheslide.training.adapter import AdapterSettings, CopeAdapter

NAME = "cacheslide_cope"
KINDS = ("llama", "mistral")


def cope_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [batch, heads, length, head_dim] -> [batch, length, heads, head_dim]."""
    if attention_mask is not None and (attention_mask.dim() != 2 or bool((attention_mask.int().diff(dim=1) > 0).any())):
        raise ModelError("CoPE attention is causal: pad on the right, and pass no other attention mask")
    window = kwargs.get("sliding_window")
    if window is not None and key.shape[2] > window:
        raise ModelError(f"{key.shape[2]} keys exceed the sliding window of {window}, which CoPE does not keep")
    if dropout:
        raise ModelError("CoPE attention has no dropout")
    # Under autocast projections are 16-bit; the table is not, nor are queries and keys after a rotation by angle 0.
    positions = module.cope_positions.to(value.dtype)
    out = cope_attention(query.to(value.dtype), key.to(value.dtype), value, positions, scaling)
    return out.transpose(1, 2).contiguous(), None


class CopeStack:
    """CoPE of a Hugging Face model, attached in place and switched on.

    Parameters
    ----------
    model : LlamaForCausalLM or MistralForCausalLM
    settings : AdapterSettings

    Raises
    ------
    ModelError
        If the model is of another kind; ConfigError if peft is not installed.
    """

    def __init__(self, model: nn.Module, settings: AdapterSettings) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise ConfigError("training a CoPE adapter needs peft: pip install peft") from None
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import flash_attention_mask

        if model.config.model_type not in KINDS:
            raise ModelError(f"CoPE attaches to {' and '.join(KINDS)} models, not to {model.config.model_type}")
        AttentionInterface.register(NAME, cope_attention_forward)
        AttentionMaskInterface.register(NAME, flash_attention_mask)  # the padding mask itself, no square masks
        self.model, self.settings = model, settings
        self.native = model.config._attn_implementation
        lora = LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, target_modules=list(settings.projections), lora_dropout=0.0
        )
        inject_adapter_in_model(lora, model)  # freezes everything else
        weight = model.get_input_embeddings().weight
        for layer in self.layers:
            table = torch.zeros(settings.p_max, layer.self_attn.head_dim, device=weight.device)
            layer.self_attn.cope_positions = nn.Parameter(table)
        model.model.rotary_emb.register_forward_hook(self._unrotated)
        self.on = False
        self.switch(True)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return self.model.model.layers

    def _unrotated(self, module: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        cos, sin = output
        return (torch.ones_like(cos), torch.zeros_like(sin)) if self.on else output

    def switch(self, on: bool) -> None:
        """Switch CoPE on, or back to the native attention."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.on = on
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(on)
        for parameter in self.parameters():  # peft freezes adapters that it switches off
            parameter.requires_grad_(True)
        self.model.set_attn_implementation(NAME if on else self.native)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Context manager: CoPE is off inside."""
        was = self.on
        self.switch(False)
        try:
            yield
        finally:
            self.switch(was)

    def named(self) -> dict[str, nn.Parameter]:
        """Trained parameters by their names in the adapter."""
        out = {}
        for i, layer in enumerate(self.layers):
            for projection in self.settings.projections:
                module = getattr(layer.self_attn, projection)
                out[f"layers.{i}.{projection}.a"] = module.lora_A["default"].weight
                out[f"layers.{i}.{projection}.b"] = module.lora_B["default"].weight
            out[f"layers.{i}.positions"] = layer.self_attn.cope_positions
        return out

    def parameters(self) -> list[nn.Parameter]:
        """Trained parameters."""
        return list(self.named().values())

    def adapter(self, base: str, notes: dict[str, Any] | None = None, dtype: torch.dtype | None = None) -> CopeAdapter:
        """The current adapter, for a base model of fingerprint `base`."""
        tensors = {k: v.detach().to("cpu", dtype or v.dtype).clone() for k, v in self.named().items()}
        return CopeAdapter(self.settings, base, tensors, notes or {})

    def load(self, adapter: CopeAdapter) -> None:
        """Copy an adapter's tensors into the model."""
        parameters = self.named()
        if adapter.settings != self.settings or parameters.keys() != adapter.tensors.keys():
            raise ModelError("the adapter has other settings or layers than this model's stack")
        with torch.no_grad():
            for name, tensor in adapter.tensors.items():
                parameters[name].copy_(tensor)
