"""The tensors of a decoder layer, by role, out of a checkpoint in Hugging Face's names."""

from collections.abc import Mapping

from torch import Tensor

from cacheslide.models.config import DecoderConfig


class DecoderLayer:
    """One layer's weights; what its family does not have is None.

    Attributes
    ----------
    q, k, v, o, gate, up, down : Tensor
        Projections [out, in].
    q_bias, k_bias, v_bias : Tensor or None
    q_norm, k_norm : Tensor [head_dim] or None
    input_norm, mlp_norm : Tensor [hidden_size]
        In front of attention and of the MLP.
    attention_out_norm, mlp_out_norm : Tensor [hidden_size] or None
        Behind them, before the residual is added.
    """

    def __init__(self, weights: Mapping[str, Tensor], index: int, config: DecoderConfig) -> None:
        def get(name: str) -> Tensor:
            return weights[f"model.layers.{index}.{name}"]

        def norm(name: str, wanted: bool = True) -> Tensor | None:
            return norm_weight(get(f"{name}.weight"), config) if wanted else None

        self.q, self.k, self.v, self.o = (get(f"self_attn.{p}_proj.weight") for p in "qkvo")
        biases = [get(f"self_attn.{p}_proj.bias") for p in "qkv"] if config.qkv_bias else [None] * 3
        self.q_bias, self.k_bias, self.v_bias = biases
        self.q_norm, self.k_norm = (norm(f"self_attn.{p}_norm", config.qk_norm) for p in "qk")
        self.gate, self.up, self.down = (get(f"mlp.{p}_proj.weight") for p in ("gate", "up", "down"))
        self.input_norm = norm("input_layernorm")
        # In Gemma's layers the norm called post_attention_layernorm is the one behind attention.
        behind, front = "post_attention_layernorm", "pre_feedforward_layernorm"
        self.mlp_norm = norm(front if config.sandwich_norms else behind)
        self.attention_out_norm = norm(behind, config.sandwich_norms)
        self.mlp_out_norm = norm("post_feedforward_layernorm", config.sandwich_norms)


def norm_weight(stored: Tensor, config: DecoderConfig) -> Tensor:
    """A norm's factors: as stored, or 1 + w in float32, where a smaller dtype would round the sum."""
    return 1.0 + stored.float() if config.unit_offset_norms else stored
