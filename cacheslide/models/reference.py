"""The plain-PyTorch Llama: the CPU host of the engine and the oracle of its tests.

Weights are read from a Hugging Face checkpoint of the Llama or Mistral family. Nothing is cached or fused
behind the caller's back, so that every step of the executor can be checked.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cacheslide.errors import ModelError
from cacheslide.kernels.row_attention.reference import by_blocks
from cacheslide.models.adapter import RowGroup
from cacheslide.models.config import LlamaConfig
from cacheslide.models.weights import check_device, fingerprint, load_weights
from cacheslide.positions.ccpe import PromptSlots
from cacheslide.positions.rope import Rotary, inverse_frequencies


class DenseKV:
    """A request's KV as two tensors [layers, capacity, kv_heads, head_dim]; unwritten rows hold NaN.

    Parameters
    ----------
    sizes : LlamaConfig or ModelAdapter
        Its layers, KV heads and head_dim.
    """

    def __init__(self, sizes, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        shape = (sizes.num_layers, capacity, sizes.num_kv_heads, sizes.head_dim)
        self.k = torch.full(shape, float("nan"), dtype=dtype, device=device)
        self.v = torch.full(shape, float("nan"), dtype=dtype, device=device)
        self.slots: PromptSlots | None = None  # where a CoPE model's prompt has its updated slots

    @property
    def capacity(self) -> int:
        """Rows it can hold."""
        return self.k.shape[1]

    def write(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """See `KVBuffer.write`."""
        self.k[layer].index_copy_(0, rows, k.to(self.k.dtype))
        self.v[layer].index_copy_(0, rows, v.to(self.v.dtype))

    def read(self, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `KVBuffer.read`."""
        return self.k[layer].index_select(0, rows), self.v[layer].index_select(0, rows)


def row_attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Causal attention of scattered query rows.

    Parameters
    ----------
    q : Tensor [n, heads, head_dim]
    k, v : Tensor [keys, kv_heads, head_dim]
        Row j of the prompt at index j; only rows up to `rows.max()` are read.
    rows : Tensor [n]
        Ascending; query i attends to keys 0..rows[i].

    Returns
    -------
    Tensor [n, heads, head_dim]
    """
    n, last = len(rows), int(rows[-1]) + 1
    missing = last - n
    if 4 * missing <= n and int(rows[0]) == missing:
        # (Nearly) the whole prompt: PyTorch's causal path skips the upper triangle by itself, but wants a square.
        queries, keys, values = (t.transpose(0, 1)[None] for t in (q, k[:last], v[:last]))
        queries, grouped = F.pad(queries, (0, 0, missing, 0)), q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=last > 1, enable_gqa=grouped)
        return out[0, :, missing:].transpose(0, 1)
    return torch.cat([attended for _, attended in by_blocks(q, k, v, rows)])


class ReferenceLlama:
    """A `ModelAdapter` over plain tensors, all heads in one rank.

    Parameters
    ----------
    config : LlamaConfig
    weights : dict[str, Tensor]
        Named as in a Hugging Face checkpoint; all of one dtype and device.
    model_id : str
        Identifies the weights in chunk keys.
    """

    ranks, rotates = 1, True

    def __init__(self, config: LlamaConfig, weights: dict[str, Tensor], model_id: str) -> None:
        self.config, self.model_id = config, model_id
        self.num_layers, self.num_kv_heads, self.head_dim = config.num_layers, config.num_kv_heads, config.head_dim
        self.hidden_size, self.max_positions = config.hidden_size, config.max_positions
        try:
            self.embedding = weights["model.embed_tokens.weight"]
            self.norm = weights["model.norm.weight"]
            self.head = self.embedding if config.tie_embeddings else weights["lm_head.weight"]
            self.layers = [_Layer(weights, i) for i in range(config.num_layers)]
        except KeyError as missing:
            raise ModelError(f"the checkpoint lacks the tensor {missing.args[0]!r}") from None
        self.dtype, self.device = self.embedding.dtype, str(self.embedding.device)
        inv = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        self.rotary = Rotary(inv, config.max_positions, self.device)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> "ReferenceLlama":
        """Load config.json and safetensors from the folder `path`."""
        config = LlamaConfig.from_pretrained(Path(path))
        check_device(device)
        return cls(config, load_weights(Path(path), dtype, device), fingerprint(Path(path)))

    def new_kv(self, capacity: int) -> DenseKV:
        """An empty KV buffer of `capacity` rows."""
        if capacity > self.config.max_positions:
            raise ModelError(f"{capacity} tokens exceed the model's {self.config.max_positions} positions")
        return DenseKV(self.config, capacity, self.dtype, self.device)

    def describe(self, kv: DenseKV, slots: PromptSlots) -> None:
        """See `ModelAdapter.describe`; rotary positions ask for no slots."""

    def embed(self, token_ids: Tensor) -> Tensor:
        """See `ModelAdapter.embed`."""
        return F.embedding(token_ids, self.embedding)

    def qkv(self, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `ModelAdapter.qkv`."""
        w = self.layers[layer]
        x = self._rms(hidden, w.input_norm)
        q, k, v = (F.linear(x, p).unflatten(-1, (-1, self.config.head_dim)) for p in (w.q, w.k, w.v))
        return self.rotary.rotate(q, positions), self.rotary.rotate(k, positions), v

    def attend(self, layer: int, q: Tensor, groups: Sequence[RowGroup]) -> Tensor:
        """See `ModelAdapter.attend`."""
        parts = q.split([len(g.rows) for g in groups])
        out = [
            row_attention(part, g.kv.k[layer], g.kv.v[layer], g.rows)
            for part, g in zip(parts, groups, strict=True)
            if len(g.rows)
        ]
        return torch.cat(out) if len(out) > 1 else out[0]

    def finish(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        """See `ModelAdapter.finish`."""
        w = self.layers[layer]
        hidden += F.linear(attended.flatten(1), w.o)  # in place, as serving hosts do: whoever still needs it shows up
        x = self._rms(hidden, w.post_norm)
        return hidden + F.linear(F.silu(F.linear(x, w.gate)) * F.linear(x, w.up), w.down)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `ModelAdapter.logits`."""
        return F.linear(self._rms(hidden, self.norm), self.head).float()

    def reduce_scores(self, scores: Tensor) -> Tensor:
        """One rank holds all heads: nothing to add."""
        return scores

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.config.rms_norm_eps)


class _Layer:
    """The nine tensors of a decoder layer, by role."""

    def __init__(self, weights: dict[str, Tensor], index: int) -> None:
        def get(name: str) -> Tensor:
            return weights[f"model.layers.{index}.{name}.weight"]

        self.q, self.k, self.v, self.o = (get(f"self_attn.{p}_proj") for p in "qkvo")
        self.gate, self.up, self.down = (get(f"mlp.{p}_proj") for p in ("gate", "up", "down"))
        self.input_norm, self.post_norm = get("input_layernorm"), get("post_attention_layernorm")
