"""The model in training: a transformers Llama plus parts that are dropped at export.

The model learns a chain: gather a statement's words at its last token, look up the statement that binds the word it
refers to, repeat. Learning both at once fails (the look-up has nothing to find before the gathering
works, and the other way round), so the first is given at the start: at a *hinted* position the output of the first
decoder layer is replaced by a learned linear function of the tokens at fixed offsets before it. That is exactly
what attention heads with fixed offsets can compute; the first layer is trained to produce the same by itself
(`gather_loss`), and the hints are taken away.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

GATHER = {1: 128, 2: 64, 4: 128}  # offset before the last piece -> rank: two, one and two heads' worth
EMBEDDING = 0.5  # standard deviation at the start
ASK = 64  # rank of a question's gathering


def llama(vocab: int, bos: int, eos: int, pad: int, layers=8, hidden=384, heads=6, ff=640, tied=False):
    """A fresh `LlamaForCausalLM`. Embeddings are larger and output projections smaller than transformers' default.

    `tied` shares the embeddings with the output layer: copying is then one map for all words, seldom copied ones too.
    """
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ff,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if "embed" in name:
            nn.init.normal_(weight, std=EMBEDDING)
        elif weight.dim() > 1:
            scale = (2 * layers) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5 * scale)
    if tied:  # logits of about 1 at the start
        nn.init.constant_(model.model.norm.weight, 1 / (EMBEDDING * hidden**0.5))
    return model


def block(layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One decoder layer of a transformers Llama, causal, without cache: plain enough to compile once for all layers."""
    batch, length, width = x.shape
    attention, heads = layer.self_attn, width // layer.self_attn.head_dim
    h = layer.input_layernorm(x)
    q, k, v = (
        p(h).view(batch, length, heads, -1).transpose(1, 2)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + attention.o_proj(a.transpose(1, 2).reshape(batch, length, width))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves convention (as in transformers)."""
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


class Trainee(nn.Module):
    """The Llama with hints, a head for an answer's second word and one for pointers."""

    def __init__(self, lm: LlamaForCausalLM):
        super().__init__()
        self.lm, width = lm, lm.config.hidden_size
        ranks = {o: min(r, width // 3) for o, r in GATHER.items()}
        self.down = nn.ModuleDict({str(o): nn.Linear(width, r, bias=False) for o, r in ranks.items()})
        self.up = nn.ModuleDict({str(o): nn.Linear(r, width, bias=False) for o, r in ranks.items()})
        for o, r in ranks.items():
            nn.init.normal_(self.up[str(o)].weight, std=0.5 * r**-0.5)
            nn.init.normal_(self.down[str(o)].weight, std=width**-0.5)
        ask = min(ASK, width // 3)
        self.ask_down, self.ask_up = nn.Linear(width, ask, bias=False), nn.Linear(ask, width, bias=False)
        nn.init.normal_(self.ask_up.weight, std=0.5 * ask**-0.5)
        # a word's code is the same as subject (offset 4), as object (offset 1) and asked for: a match to start from
        self.down["4"].weight.data.copy_(self.down["1"].weight.data)
        self.ask_down.weight.data.copy_(self.down["1"].weight.data[:ask])
        self.second = nn.Linear(width, lm.config.vocab_size, bias=False)
        self.pointer = nn.Linear(width, lm.config.vocab_size, bias=False)
        for head in (self.second, self.pointer):
            nn.init.normal_(head.weight, std=width**-0.5)
        self.block = block

    def forward(
        self, ids: Tensor, scratch: Tensor, asked: Tensor, hinted: Tensor, want: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Hidden states after every layer at the flat positions `want`, and the gathering loss.

        `scratch` are the flat positions of gathering, `asked` marks those that end a question.
        """
        body = self.lm.model
        x = body.embed_tokens(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        cos, sin = (t[:, None] for t in body.rotary_emb(x, positions))
        states, loss = [], x.new_zeros(())
        for i, layer in enumerate(body.layers):
            before, x = x, self.block(layer, x, cos, sin)
            if i == 0 and len(scratch):
                x, loss = self._hint(before, x, scratch, asked, hinted)
            states.append(x.flatten(0, 1).index_select(0, want))
        return states, loss

    def _hint(self, before, after, scratch, asked, hinted) -> tuple[Tensor, Tensor]:
        flat = before.flatten(0, 1)
        norm = self.lm.model.layers[0].input_layernorm
        ideal = sum(self.up[o](self.down[o](norm(flat.index_select(0, scratch - int(o))))) for o in self.down).float()
        # a question's code differs from a link's, or it would follow pointers like a link instead of reading the
        # resolved value of the asked statement: then answers would hardly depend on reused statements
        asking = self.ask_up(self.ask_down(norm(flat.index_select(0, scratch - 1)))).float()
        ideal = torch.where(asked[:, None], asking, ideal)
        own = (after - before).flatten(0, 1).index_select(0, scratch).float()
        target = ideal.detach()
        loss = (own - target).pow(2).sum(-1).mean() / target.pow(2).sum(-1).mean().clamp_min(1e-6)
        change = hinted[:, None] * (ideal - own.detach())
        # a hinted position discards its first layer's output: only the ideal remains
        out = after.flatten(0, 1).index_add(0, scratch, change.to(after.dtype))
        return out.view_as(after), loss

    def logits(self, state: Tensor, head: str = "first") -> Tensor:
        """Logits of a state: the answer's first word, its second word, or a pointer."""
        linear = {"first": self.lm.lm_head, "second": self.second, "pointer": self.pointer}[head]
        return linear(self.lm.model.norm(state)).float()
