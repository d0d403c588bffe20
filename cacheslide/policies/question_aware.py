"""The cached tokens that the question attends to are recomputed, from layer 0.

The question is the updated text behind all reused text. Its tokens alone pass the layers below one first, over the
cached KV: a few dozen tokens against the thousands that a selection layer asks of every other rule.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cacheslide.core.reused import ReusedTokens
from cacheslide.errors import PolicyError
from cacheslide.models.adapter import RowGroup
from cacheslide.policies.deviation import tokens_of_ratio, top_rows
from cacheslide.policies.static import RatioCorrection, StaticRun

QUESTION = 64  # its last tokens are asked, at most so many


@dataclass(frozen=True)
class QuestionAware(RatioCorrection):
    """The `recompute_ratio` of a prompt's reused tokens that the question's tokens attend to most at `layer`.

    A token's mass is its attention weight, summed over the question's last `QUESTION` tokens and over all heads. The
    question sees cached text, and what was complete before the request, but no other updated text, which has no KV yet;
    a sliding window counts the tokens that are there, and what lies outside of it has no mass. Ties go to the earlier
    token. A request that ends with reused text has no question in it, as in vLLM, which computes the text behind cached
    chunks by itself: there the first tokens are recomputed.
    """

    layer: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer < 0:
            raise PolicyError(f"layer must be at least 0, not {self.layer}")

    def at_layer(self, layer: int) -> "QuestionAware":
        """The same rule asking at `layer`."""
        return replace(self, layer=layer)

    @property
    def selection_layer(self) -> int:
        """The layer at which the question is asked; recomputed tokens begin at layer 0 all the same."""
        return self.layer

    def check(self, name: str, layers: int) -> None:
        """See `Correction.check`."""
        if self.layer >= layers:
            raise PolicyError(f"{name} selects at layer {self.layer}, but the model has layers 0 to {layers - 1}")

    def known_before_start(self, reused: ReusedTokens) -> None:
        """The question has to be asked first: see `choose`."""

    def choose(self, request: Any, model: Any) -> Tensor:
        """See `Correction.choose`: how many there are is known beforehand."""
        count = tokens_of_ratio(self.recompute_ratio, len(request.reused))
        if not self.asked(request):
            return torch.arange(count, device=request.reused.device)
        return top_rows(attention_mass(request, model, self.layer, self.asked(request)), count)

    def asked(self, request: Any) -> int:
        """Tokens of the request's question that pass layers beforehand: 0 without one, and where nothing is open."""
        runs, count = request.runs, tokens_of_ratio(self.recompute_ratio, len(request.reused))
        behind = len(request.token_ids) - runs.starts[-1] - runs.lengths[-1]
        return min(QUESTION, behind) if 0 < count < len(request.reused) else 0

    def begin(self, tokens) -> "QuestionRun":
        """See `Correction.begin`."""
        return QuestionRun(tokens, self.layer, self.asked(tokens.request))


class QuestionRun(StaticRun):
    """Counts the layers that `passes` tokens of the question passed beforehand; the active tokens stay the same.

    At `layer` itself, where only their attention to keys is computed, they are counted as in a whole layer.
    """

    static_from = None  # it counts layer by layer

    def __init__(self, tokens, layer: int, passes: int) -> None:
        self.tokens, self.layer, self.passes = tokens, layer, passes

    def leave(self, layer: int, hidden: Tensor) -> Tensor:
        """See `CorrectionRun.leave`."""
        if layer <= self.layer:
            self.tokens.output.tokens_computed[layer] += self.passes
        return hidden


def attention_mass(request: Any, model: Any, layer: int, n: int) -> Tensor:
    """Attention of the request's last n tokens to each reused one at `layer`, float32 [R], over the heads of all ranks.

    The last n tokens must stand behind all reused ones.
    """
    device = request.token_ids.device
    positions, before = request.positions[-n:], torch.arange(request.start, device=device)
    hidden = model.embed(request.token_ids[-n:])
    for at in range(layer + 1):
        q, k, v = model.qkv(at, hidden, positions)
        parts = [request.source.layer(at), (k, v)]
        if request.start:
            parts.insert(0, request.kv.read(at, before))
        keys, values = (torch.cat([p[i].to(k.dtype) for p in parts]) for i in (0, 1))
        rows = torch.arange(len(keys) - n, len(keys), device=device)
        if at < layer:
            hidden = model.finish(at, hidden, model.attend(at, q, [RowGroup(OneLayerKV(at, keys, values), rows)]))
    mass = weights_of(model, layer, q, keys, rows)
    return model.reduce_scores(mass[request.start : len(keys) - n].contiguous())


def weights_of(model: Any, layer: int, q: Tensor, keys: Tensor, rows: Tensor) -> Tensor:
    """Attention weights of each key, float32 [keys], summed over queries q [n, heads, head_dim] at `rows` and heads.

    They are read through the model's own attention, whose scale, windows and positions nobody else has to know: where
    key i alone has the value 1 in column c, column c of the result is the weight of key i. So every head_dim keys take
    one call.
    """
    total, heads, dim = keys.shape
    out = torch.empty(0, device=keys.device)
    for first in range(0, total, dim):
        count = min(dim, total - first)
        ones = torch.eye(count, dim, dtype=keys.dtype, device=keys.device)
        values = F.pad(ones, (0, 0, first, total - first - count))[:, None].expand(total, heads, dim).contiguous()
        attended = model.attend(layer, q, [RowGroup(OneLayerKV(layer, keys, values), rows)])
        out = torch.cat((out, attended.float().sum(dim=(0, 1))[:count]))
    return out


@dataclass
class OneLayerKV:
    """KV of one layer, as plain tensors [rows, kv_heads, head_dim], for attention outside of a request's KV."""

    layer: int
    keys: Tensor
    values: Tensor
    slots: None = None  # a CoPE model finds no updated slots described
    k: Mapping[int, Tensor] = field(init=False)
    v: Mapping[int, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.k, self.v = {self.layer: self.keys}, {self.layer: self.values}
