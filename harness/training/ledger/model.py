"""The ledger model in training: a deep, thin Qwen3 (query-key norm, grouped queries), and heads dropped at export.

The model learns a chain: gather, at an entry's evidence, the field and name that are set and their source; look up the
latest entry of that source; represent its content. Each link of the chain has separate layers, in which the attention
of one head is supervised (`losses.py`), so that only the values carried along remain to be learned.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


@dataclass(frozen=True)
class Size:
    """Counts of the model; `theta` is the base of its rotation."""

    vocab: int = 768
    layers: int = 24
    hidden: int = 128
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    ff: int = 288
    theta: float = 1e7
    positions: int = 16384


class Block(nn.Module):
    """One layer, with the projections of attention and of the gate fused into one matrix each."""

    def __init__(self, s: Size) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = s.heads, s.kv_heads, s.head_dim
        inner = s.heads * s.head_dim
        self.qkv = nn.Parameter(torch.randn(inner + 2 * s.kv_heads * s.head_dim, s.hidden) * s.hidden**-0.5)
        # Small initial layer outputs keep the sum over a deep stack bounded.
        self.out = nn.Parameter(torch.randn(s.hidden, inner) * (inner * 2 * s.layers) ** -0.5)
        self.gate_up = nn.Parameter(torch.randn(2 * s.ff, s.hidden) * s.hidden**-0.5)
        self.down = nn.Parameter(torch.randn(s.hidden, s.ff) * (s.ff * 2 * s.layers) ** -0.5)
        self.input_norm, self.mlp_norm = nn.Parameter(torch.ones(s.hidden)), nn.Parameter(torch.ones(s.hidden))
        # Normed queries and keys give scores of at most w² sqrt(head_dim): enough to single out one of 8k tokens.
        self.q_norm = nn.Parameter(torch.full((s.head_dim,), 1.5))
        # Keys have equal norms: a weight per dimension would lengthen the keys of frequent targets.
        self.register_buffer("k_norm", torch.full((s.head_dim,), 1.5), persistent=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [batch, length, hidden] -> the same, rotated queries [batch, heads, length, head_dim], and keys."""
        batch, length, _ = x.shape
        sizes = [self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.dim]
        projected = F.linear(norm(x, self.input_norm), self.qkv).split(sizes, -1)
        q, k, v = (p.view(batch, length, -1, self.dim).transpose(1, 2) for p in projected)
        q, k = (rotate(norm(t, w), cos, sin).to(v.dtype) for t, w in ((q, self.q_norm), (k, self.k_norm)))
        # Explicit repeat: with grouped queries some backends fall back to length² scores, too large for a GPU.
        keys, values = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        a = F.scaled_dot_product_attention(q, keys, values, is_causal=True)
        x = x + F.linear(a.transpose(1, 2).flatten(2), self.out)
        gate, up = F.linear(norm(x, self.mlp_norm), self.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down), q, k


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMS norm over the last dimension, in float32."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight, EPS)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves convention; cos and sin [length, head_dim]."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class LedgerModel(nn.Module):
    """The decoder, and linear heads that read gathered words and content at an entry's evidence."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.embedding = nn.Parameter(torch.randn(size.vocab, size.hidden) * 0.5)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.Parameter(torch.full((size.hidden,), 2 / size.hidden**0.5))  # tied logits of about 1
        for name in ("subject", "source", "held"):
            head = nn.Linear(size.hidden, size.vocab, bias=False)
            nn.init.normal_(head.weight, std=size.hidden**-0.5)
            self.add_module(name, head)
        self.run = [block.forward for block in self.blocks]
        frequencies = size.theta ** (-torch.arange(0, size.head_dim, 2).float() / size.head_dim)
        angles = torch.outer(torch.arange(size.positions).float(), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def compile(self) -> None:
        """Compile one layer for all: once for the first shape, once for all other shapes."""
        compiled = torch.compile(Block.forward)
        self.run = [lambda x, c, s, b=block: compiled(b, x, c, s) for block in self.blocks]

    def forward(self, ids: Tensor, watched: frozenset[int]) -> tuple[list[Tensor], dict[int, tuple[Tensor, Tensor]]]:
        """States after every layer [batch, length, hidden], and queries and keys of the `watched` layers."""
        x = F.embedding(ids, self.embedding)  # the residual stream stays in float32, also under autocast
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        states, looks = [], {}
        for i, run in enumerate(self.run):
            x, q, k = run(x, cos, sin)
            states.append(x)
            if i in watched:
                looks[i] = q, k
        return states, looks

    def logits(self, state: Tensor) -> Tensor:
        """Next-token logits, float32."""
        return F.linear(self._normed(state), self.embedding).float()

    def shown(self, state: Tensor, head: str) -> Tensor:
        """Logits over words of the head `head`: "subject", "source" or "held"; float32."""
        return self.get_submodule(head)(self._normed(state)).float()

    def _normed(self, state: Tensor) -> Tensor:
        return norm(state, self.norm)


def plain_weights(model: LedgerModel) -> dict[str, Tensor]:
    """The decoder's tensors under the names of a Qwen3 checkpoint."""
    s = model.size
    out = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm}
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    for i, b in enumerate(model.blocks):
        parts = dict(zip(("q", "k", "v"), b.qkv.split([q, kv, kv]), strict=True)) | {"o": b.out}
        named = {f"self_attn.{n}_proj": w for n, w in parts.items()}
        named |= {"self_attn.q_norm": b.q_norm, "self_attn.k_norm": b.k_norm}
        gate, up = b.gate_up.chunk(2)
        named |= {"mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": b.down}
        named |= {"input_layernorm": b.input_norm, "post_attention_layernorm": b.mlp_norm}
        out |= {f"model.layers.{i}.{n}.weight": w for n, w in named.items()}
    return out
