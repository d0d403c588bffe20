"""The plain-PyTorch decoder: the reference host of the engine and the oracle of its tests.

Weights come from a Hugging Face checkpoint or a GGUF file of a family in `models.families`; families differ only in
their configuration. Nothing is cached or fused implicitly, so every step of the executor can be checked.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cacheslide.errors import ModelError
from cacheslide.models.adapter import RowGroup, write_each
from cacheslide.models.attention import narrow_attention, row_attention
from cacheslide.models.config import DecoderConfig
from cacheslide.models.decoder_layer import DecoderLayer, fitting, norm_weight
from cacheslide.models.dense_kv import DenseKV
from cacheslide.models.weights import fingerprint, load_checkpoint
from cacheslide.positions.ccpe import PromptSlots
from cacheslide.positions.rope import Rotary, inverse_frequencies

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


class ReferenceDecoder:
    """A `ModelAdapter` over plain tensors, all heads in one rank.

    Parameters
    ----------
    config : DecoderConfig
    weights : dict[str, Tensor]
        Named as in a Hugging Face checkpoint; all of one dtype and device.
    model_id : str
        Identifies the weights in chunk keys.
    """

    ranks, rotates = 1, True

    def __init__(self, config: DecoderConfig, weights: Mapping[str, Tensor], model_id: str) -> None:
        self.config, self.model_id = config, model_id
        self.num_layers, self.num_kv_heads, self.head_dim = config.num_layers, config.num_kv_heads, config.head_dim
        self.hidden_size, self.max_positions = config.hidden_size, config.max_positions
        vocabulary = config.vocab_size, config.hidden_size
        self.embedding = fitting(weights, "model.embed_tokens.weight", *vocabulary)
        self.norm = norm_weight(fitting(weights, "model.norm.weight", config.hidden_size), config)
        self.head = self.embedding if config.tie_embeddings else fitting(weights, "lm_head.weight", *vocabulary)
        self.layers = [DecoderLayer(weights, i, config) for i in range(config.num_layers)]
        self.dtype, self.device = self.embedding.dtype, str(self.embedding.device)
        # Rounded to the embeddings' dtype, as in transformers.
        self._embedding_scale = float(torch.tensor(config.embedding_scale).to(self.dtype))
        self._activation = ACTIVATIONS[config.activation]
        self.rotaries = _rotaries(config, self.device)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> "ReferenceDecoder":
        """Load config.json and safetensors from the folder `path`, or all from the GGUF file `path`."""
        config, weights = load_checkpoint(Path(path), dtype, device)
        return cls(config, weights, fingerprint(Path(path)))

    def new_kv(self, capacity: int) -> DenseKV:
        """An empty KV buffer of `capacity` rows."""
        if capacity > self.config.max_positions:
            raise ModelError(f"{capacity} tokens exceed the model's {self.config.max_positions} positions")
        return DenseKV(self.config, capacity, self.dtype, self.device)

    def describe(self, kv: DenseKV, slots: PromptSlots) -> None:
        """See `ModelAdapter.describe`; rotary positions need no slots."""

    def embed(self, token_ids: Tensor) -> Tensor:
        """See `ModelAdapter.embed`."""
        embedded = F.embedding(token_ids, self.embedding)
        return embedded if self._embedding_scale == 1.0 else embedded * self._embedding_scale

    def qkv(self, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `ModelAdapter.qkv`."""
        w, rotary = self.layers[layer], self.rotaries[layer]
        x = self._rms(hidden, w.input_norm)
        projections = (w.q, w.q_bias), (w.k, w.k_bias), (w.v, w.v_bias)
        q, k, v = (F.linear(x, p, bias).unflatten(-1, (-1, self.config.head_dim)) for p, bias in projections)
        q, k = self._normed(q, w.q_norm), self._normed(k, w.k_norm)
        return rotary.rotate(q, positions), rotary.rotate(k, positions), v

    def write(self, layer: int, groups: Sequence[RowGroup], k: Tensor, v: Tensor) -> None:
        """See `ModelAdapter.write`."""
        write_each(layer, groups, k, v)

    def attend(self, layer: int, q: Tensor, groups: Sequence[RowGroup]) -> Tensor:
        """See `ModelAdapter.attend`."""
        scale, window = self.config.attention_scale, self.config.windows[layer]
        parts = q.split([len(g.rows) for g in groups])
        out = [
            _group_attention(part, g.kv.k[layer], g.kv.v[layer], g, scale, window)
            for part, g in zip(parts, groups, strict=True)
            if len(g.rows)
        ]
        return torch.cat(out) if len(out) > 1 else out[0]

    def finish(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        """See `ModelAdapter.finish`."""
        w = self.layers[layer]
        # In place, as in serving hosts: a caller that still needs the input fails a test.
        hidden += self._normed(F.linear(attended.flatten(1), w.o), w.attention_out_norm)
        x = self._rms(hidden, w.mlp_norm)
        x = F.linear(self._activation(F.linear(x, w.gate)) * F.linear(x, w.up), w.down)
        return hidden + self._normed(x, w.mlp_out_norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `ModelAdapter.logits`."""
        return F.linear(self._rms(hidden, self.norm), self.head).float()

    def reduce_scores(self, scores: Tensor) -> Tensor:
        """Returns `scores`: one rank holds all heads."""
        return scores

    def _normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else self._rms(x, weight)

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm in the weight's dtype, which is wider than that of `x` where transformers norms in float32."""
        return F.rms_norm(x.to(weight.dtype), (x.shape[-1],), weight, self.config.rms_norm_eps).to(x.dtype)


def _group_attention(q: Tensor, k: Tensor, v: Tensor, group: RowGroup, scale: float, window: int | None) -> Tensor:
    out = row_attention(q, k, v, group.rows, scale, window, group.rows_on_host)
    if group.narrow is not None and bool(group.narrow.any()):
        out = out.clone()
        out[group.narrow] = narrow_attention(q[group.narrow], k, v, group.rows[group.narrow], group.open, scale, window)
    return out


def _rotaries(config: DecoderConfig, device: str) -> list[Rotary]:
    """One per layer; layers with one rotation share their tables."""
    made: list[Rotary] = []
    for layer, rope in enumerate(config.ropes):
        if rope in config.ropes[:layer]:
            made.append(made[config.ropes.index(rope)])
        else:
            inv = inverse_frequencies(config.head_dim, rope.theta, rope.scaling)
            made.append(Rotary(inv, config.max_positions, device))
    return made
