"""The weight tensors of a decoder layer, by role, from a checkpoint with Hugging Face's names."""

from collections.abc import Mapping

from torch import Tensor

from cacheslide.errors import ModelError
from cacheslide.models.config import DecoderConfig


class DecoderLayer:
    """One layer's weights; tensors that its family does not have are None.

    Attributes
    ----------
    q, k, v, o, gate, up, down : Tensor
        Projections [out, in].
    q_bias, k_bias, v_bias : Tensor or None
    q_norm, k_norm : Tensor [head_dim] or None
    input_norm, mlp_norm : Tensor [hidden_size]
        Before attention and before the MLP.
    attention_out_norm, mlp_out_norm : Tensor [hidden_size] or None
        After attention and after the MLP, before the residual is added.
    """

    def __init__(self, weights: Mapping[str, Tensor], index: int, config: DecoderConfig) -> None:
        hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
        heads, kv = config.num_heads * dim, config.num_kv_heads * dim

        def get(name: str, *shape: int) -> Tensor:
            return fitting(weights, f"model.layers.{index}.{name}", *shape)

        def norm(name: str, wanted: bool = True, size: int = hidden) -> Tensor | None:
            return norm_weight(get(f"{name}.weight", size), config) if wanted else None

        rows = {"q": heads, "k": kv, "v": kv}
        self.q, self.k, self.v = (get(f"self_attn.{p}_proj.weight", n, hidden) for p, n in rows.items())
        self.o = get("self_attn.o_proj.weight", hidden, heads)
        biases = (get(f"self_attn.{p}_proj.bias", n) if config.qkv_bias else None for p, n in rows.items())
        self.q_bias, self.k_bias, self.v_bias = biases
        self.q_norm, self.k_norm = (norm(f"self_attn.{p}_norm", config.qk_norm, dim) for p in "qk")
        self.gate, self.up = (get(f"mlp.{p}_proj.weight", inner, hidden) for p in ("gate", "up"))
        self.down = get("mlp.down_proj.weight", hidden, inner)
        self.input_norm = norm("input_layernorm")
        # In Gemma's layers post_attention_layernorm is the norm after attention.
        behind, front = "post_attention_layernorm", "pre_feedforward_layernorm"
        self.mlp_norm = norm(front if config.sandwich_norms else behind)
        self.attention_out_norm = norm(behind, config.sandwich_norms)
        self.mlp_out_norm = norm("post_feedforward_layernorm", config.sandwich_norms)


def fitting(weights: Mapping[str, Tensor], name: str, *shape: int) -> Tensor:
    """The tensor `name` of a checkpoint; ModelError when it is missing or not of `shape`."""
    if name not in weights:
        raise ModelError(f"the checkpoint lacks the tensor {name!r}")
    if tuple(weights[name].shape) != shape:
        raise ModelError(f"{name} is of shape {tuple(weights[name].shape)}, its configuration asks for {shape}")
    return weights[name]


def norm_weight(stored: Tensor, config: DecoderConfig) -> Tensor:
    """A norm's factors: as stored, or 1 + w in float32, since a smaller dtype would round the sum."""
    return 1.0 + stored.float() if config.unit_offset_norms else stored
