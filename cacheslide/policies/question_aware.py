"""Recomputes the cached tokens that the question attends to, from layer 0.

The question is the updated text after all reused text. Its tokens alone first pass the layers up to the chosen one,
over the cached KV: a few dozen tokens, against the thousands that pass the layers below a selection layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cacheslide.core.reused import ReusedTokens
from cacheslide.errors import PolicyError
from cacheslide.models.adapter import RowGroup
from cacheslide.policies.attention_weights import OneLayerKV, weights_of
from cacheslide.policies.deviation import tokens_of_ratio, top_rows
from cacheslide.policies.layer_selection import check_layer
from cacheslide.policies.static import RatioCorrection, StaticRun

QUESTION = 64  # at most this many of its last tokens are used


@dataclass(frozen=True)
class QuestionRule(RatioCorrection):
    """The `recompute_ratio` of a prompt's reused tokens of the highest `mass` for the question.

    The question attends to cached text and to rows complete before the request, but to no other updated text, which has
    no KV yet. Ties go to the earlier token. A request that ends with reused text contains no question (in vLLM, which
    computes the text after cached chunks itself); its first tokens are recomputed. A subclass adds `mass` and `passes`.
    """

    @property
    def asks(self) -> bool:
        """See `Correction.asks`."""
        return True

    def known_before_start(self, reused: ReusedTokens) -> None:
        """None, since the question's attention determines the tokens: see `choose`."""

    def mass(self, request: Any, model: Any, n: int) -> Tensor:
        """Relevance of each reused token to the request's last n tokens, which follow all reused ones: float32 [R]."""
        raise NotImplementedError

    def passes(self, layers: int) -> int:
        """Layers, of `layers`, that the question passes before the request, the one that yields `mass` included."""
        raise NotImplementedError

    def limit(self, behind: int) -> int:
        """Number of a question's `behind` tokens whose attention is used, counted from its end."""
        return behind

    def choose(self, request: Any, model: Any) -> Tensor:
        """See `Correction.choose`; the number of tokens is known beforehand."""
        count = tokens_of_ratio(self.recompute_ratio, len(request.reused))
        if not self.asked(request):
            return torch.arange(count, device=request.reused.device)
        return top_rows(self.mass(request, model, self.asked(request)), count)

    def asked(self, request: Any) -> int:
        """Question tokens that pass layers before the request: 0 without a question or without tokens to choose."""
        runs, count = request.runs, tokens_of_ratio(self.recompute_ratio, len(request.reused))
        behind = len(request.token_ids) - runs.starts[-1] - runs.lengths[-1]
        return self.limit(behind) if 0 < count < len(request.reused) else 0

    def begin(self, tokens) -> "QuestionRun":
        """See `Correction.begin`."""
        return QuestionRun(tokens, self.passes(tokens.model.num_layers), self.asked(tokens.request))


@dataclass(frozen=True)
class QuestionAware(QuestionRule):
    """`QuestionRule` by the question's attention at one `layer`.

    A token's mass is its attention weight, summed over the question's last `QUESTION` tokens and over all heads. Tokens
    outside a sliding window have no mass.
    """

    layer: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer < 0:
            raise PolicyError(f"layer must be at least 0, not {self.layer}")

    def at_layer(self, layer: int) -> "QuestionAware":
        """The same rule with the question's attention read at `layer`."""
        return replace(self, layer=layer)

    @property
    def selection_layer(self) -> int:
        """The layer at which the question's attention is read; recomputed tokens still begin at layer 0."""
        return self.layer

    def check(self, name: str, layers: int) -> None:
        """See `Correction.check`."""
        check_layer(name, self.layer, layers)

    def mass(self, request: Any, model: Any, n: int) -> Tensor:
        """See `QuestionRule.mass`."""
        return attention_mass(request, model, self.layer, n)

    def passes(self, layers: int) -> int:
        """See `QuestionRule.passes`."""
        return self.layer + 1

    def limit(self, behind: int) -> int:
        """See `QuestionRule.limit`."""
        return min(QUESTION, behind)


class QuestionRun(StaticRun):
    """Counts the `layers` that `passes` question tokens passed before the request; the active tokens stay the same.

    The last of these layers, of which only attention to keys is computed, counts as a whole layer.
    """

    static_from = None  # it counts layer by layer

    def __init__(self, tokens, layers: int, passes: int) -> None:
        self.tokens, self.layers, self.passes = tokens, layers, passes

    def leave(self, layer: int, hidden: Tensor) -> Tensor:
        """See `CorrectionRun.leave`."""
        if layer < self.layers:
            self.tokens.output.tokens_computed[layer] += self.passes
        return hidden


def attention_mass(request: Any, model: Any, layer: int, n: int) -> Tensor:
    """Attention of the request's last n tokens to each reused one at `layer`, float32 [R], over the heads of all ranks.

    The last n tokens must follow all reused ones.
    """
    for at, q, keys, rows in asking(request, model, layer + 1, n):
        if at == layer:
            mass = weights_of(model, layer, q, keys, rows)
    return model.reduce_scores(mass[request.start : len(keys) - n].contiguous())


def asking(request: Any, model: Any, layers: int, n: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Run the request's last n tokens alone through `layers` layers, over rows complete before it and the cached KV.

    Yields a layer, its queries [n, heads, head_dim], the keys [start + R + n, kv_heads, head_dim] they attend to, and
    the rows [n] of the queries among these.
    """
    device = request.token_ids.device
    positions, before = request.positions[-n:], torch.arange(request.start, device=device)
    hidden = model.embed(request.token_ids[-n:])
    for at in range(layers):
        q, k, v = model.qkv(at, hidden, positions)
        parts = [request.source.layer(at), (k, v)]
        if request.start:
            parts.insert(0, request.kv.read(at, before))
        keys, values = (torch.cat([p[i].to(k.dtype) for p in parts]) for i in (0, 1))
        rows = torch.arange(len(keys) - n, len(keys), device=device)
        yield at, q, keys, rows
        if at < layers - 1:
            hidden = model.finish(at, hidden, model.attend(at, q, [RowGroup(OneLayerKV(at, keys, values), rows)]))
