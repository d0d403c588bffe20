"""One request under `TopDeviation`: select by deviation, fuse, swap converged tokens, promote further ones.

The order is the paper's (Alg. 2); promotion, which restarts tokens from cached layer inputs, is this project's own.
"""

import torch
from torch import Tensor

from cacheslide.errors import PolicyError
from cacheslide.models.adapter import RowGroup
from cacheslide.policies.deviation import deviation, fuse, fusion_weight, squared_norm, tokens_of_ratio, top_rows
from cacheslide.quality.similarity import cksim


class TopDeviationRun:
    """One request under `TopDeviation`, for the duration of its prefill.

    Parameters
    ----------
    rule : TopDeviation
    tokens : ActiveTokens
        The request's tokens; this object moves them in and out of the active set.
    """

    def __init__(self, rule, tokens) -> None:
        self.rule, self.tokens = rule, tokens
        self.request, self.model = tokens.request, tokens.model
        self.scores: Tensor | None = None  # deviation at the selection layer, of every reused token
        self.alpha: Tensor | None = None  # the paper's fusion weight, carried from layer to layer
        self.stopped: Tensor | None = None  # hidden state of each reused token at the selection layer (for swaps)
        self.left: Tensor | None = None  # tokens that have converged: no longer in Alg. 2's S

    @property
    def static_from(self) -> int | None:
        """The first layer from which the run changes nothing (`ActiveTokens.static_from`), None without one."""
        rule = self.rule
        if rule.fusion != "replace" or rule.swap:
            return None
        return max(rule.layer, *(p.layer for p in rule.promote), -1) + 1

    def enter(self, layer: int, *states: Tensor) -> tuple[Tensor, ...]:
        """See `CorrectionRun.enter`; `states` are hidden, q, k, v."""
        rule = self.rule
        if layer < rule.layer:
            return states
        if layer == rule.layer:
            states = self._select(layer, *states)
        elif rule.swap and (layer - rule.layer) % rule.swap.every == 0:
            states = self._swap(layer, *states)
        if rule.fusion != "replace":
            hidden, q, k, v = states
            states = hidden, q, *self._fuse(layer, k, v)
        return states

    def _score(self, layer: int, index: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Deviation of fresh k, v [n, ...] of the reused tokens at `index` [n], summed over ranks."""
        return self.model.reduce_scores(self.request.source.deviation(layer, index, k, v, self.rule.metric))

    def _select(self, layer: int, hidden: Tensor, *qkv: Tensor) -> tuple[Tensor, ...]:
        tokens, reused = self.tokens, self.tokens.reused
        every = torch.arange(len(reused), device=hidden.device)
        self.scores = self._score(layer, every, qkv[1][reused], qkv[2][reused])
        count = tokens_of_ratio(self.rule.recompute_ratio, len(reused))
        tokens.mask.index_fill_(0, top_rows(self.scores, count), True)
        if self.rule.swap:
            self.stopped = hidden[reused].clone()
            self.left = torch.zeros_like(tokens.mask)
        self._activate(count)
        return tuple(t[tokens.active] for t in (hidden, *qkv))

    def _activate(self, count: int) -> None:
        self.tokens.activate_chosen(count)
        if self.rule.attends == "updated":
            self.tokens.narrow_chosen()

    def _swap(self, layer: int, hidden: Tensor, *qkv: Tensor) -> tuple[Tensor, ...]:
        tokens, reused, chosen = self.tokens, self.tokens.reused, self.tokens.chosen
        at = torch.searchsorted(tokens.active, reused[chosen])  # indices of the chosen tokens among the active
        ck, _ = self.request.source.layer(layer, chosen)
        alike = self.model.reduce_scores(cksim(qkv[1][at], ck)) / self.model.ranks
        leaves = self.rule.swap.converged(alike)
        leaving, waiting = chosen[leaves], tokens.resting[~self.left[tokens.resting]]
        if not len(leaving):
            return hidden, *qkv
        entering = waiting[top_rows(self.scores[waiting], len(leaving))]
        fresh = self.stopped[entering]
        if self.rule.swap.start == "inputs":
            cached = self.request.source.inputs(layer, entering)
            if cached is None:
                raise PolicyError(f"a swap at layer {layer} from cached layer inputs, but the chunks hold none")
            fresh = cached.to(hidden.dtype)
        positions = self.request.positions[reused[entering]]
        added = self.model.qkv(layer, fresh, positions) if len(entering) else [t[:0] for t in qkv]
        stays = torch.ones(len(tokens.active), dtype=torch.bool, device=hidden.device)
        stays[at[leaves]] = False
        order = torch.cat((tokens.active[stays], reused[entering])).argsort()
        tokens.mask[leaving], tokens.mask[entering], self.left[leaving] = False, True, True
        self._activate(len(chosen) - len(leaving) + len(entering))
        pairs = zip((hidden, *qkv), (fresh, *added), strict=True)
        return tuple(torch.cat((old[stays], new))[order] for old, new in pairs)

    def _fuse(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.tokens
        at = torch.searchsorted(tokens.active, tokens.reused[tokens.chosen])
        ck, cv = self.request.source.layer(layer, tokens.chosen)
        d = self.model.reduce_scores(deviation(k[at], ck))
        size = self.model.reduce_scores(squared_norm(ck))
        alpha = fusion_weight(self.rule.fusion, d, size, self.rule.constant)
        if self.rule.fusion == "paper":  # Alg. 2 fuses with the weight of the layer before, then updates it
            if self.alpha is None:
                self.alpha = alpha.new_full((len(tokens.reused),), float("nan"))
            carried = self.alpha[tokens.chosen]
            self.alpha[tokens.chosen], alpha = alpha, torch.where(carried.isnan(), alpha, carried)
        tokens.output.alpha[layer] = alpha.mean() if len(alpha) else alpha.new_zeros(())
        k, v = k.clone(), v.clone()
        k[at], v[at] = fuse(k[at], ck, alpha), fuse(v[at], cv, alpha)
        return k, v

    def leave(self, layer: int, hidden: Tensor) -> Tensor:
        """After `layer`: restart resting tokens from their cached layer inputs and keep the most deviating ones."""
        tokens = self.tokens
        share = {p.layer: p.recompute_ratio for p in self.rule.promote}.get(layer)
        if share is None or layer + 1 >= self.model.num_layers or not len(tokens.resting):
            return hidden
        cached = self.request.source.inputs(layer, tokens.resting)
        if cached is None:
            raise PolicyError(f"promotion at layer {layer} needs cached layer inputs, but the chunks hold none")
        rows = tokens.reused[tokens.resting]
        positions = self.request.positions[rows]
        cached = cached.to(hidden.dtype)
        q, _, _ = self.model.qkv(layer, cached, positions)
        group = RowGroup(self.request.kv, tokens.resting_rows)
        probed = self.model.finish(layer, cached, self.model.attend(layer, q, [group]))
        tokens.output.tokens_computed[layer] += len(rows)
        _, k, v = self.model.qkv(layer + 1, probed, positions)
        scores = self._score(layer + 1, tokens.resting, k, v)
        new = top_rows(scores, tokens_of_ratio(share, len(tokens.reused)))
        order = torch.cat((tokens.active, rows[new])).argsort()
        tokens.mask.index_fill_(0, tokens.resting[new], True)
        tokens.activate_chosen(len(tokens.chosen) + len(new))
        return torch.cat((hidden, probed[new]))[order]
