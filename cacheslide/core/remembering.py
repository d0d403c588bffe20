"""Remembered deviation: how far each token's KV in a prompt is from its KV in a reference context, over all layers.

score_i = Σ_l ( mean (K_i - K'_i)² / mean K'² + mean (V_i - V'_i)² / mean V'² ), with K, V from the prompt and K', V'
from the reference. Means in the numerators are over heads and head_dim of token i; those in the denominators also over
all tokens of the chunk. K' is turned to K's positions first, so a score does not depend on where the chunk lies.

With tensor parallelism every rank sums over its own heads; one reduction gives all ranks the same scores.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cacheslide.core.keys import fixed_text
from cacheslide.core.plan import Plan
from cacheslide.core.prompt import Prompt, Role
from cacheslide.core.tensors import send, tensor_of
from cacheslide.models.adapter import KVBuffer, ModelAdapter
from cacheslide.policies.deviation import deviation, squared_norm
from cacheslide.positions.ccpe import slots_between, slots_in
from cacheslide.store.base import ChunkKV

Context = tuple[KVBuffer, Sequence[int]]  # KV and the positions of its rows
Reduce = Callable[[Tensor], Tensor]
_LEAST = 1e-30  # lower bound of a mean square: a layer that is zero in both contexts scores 0


@dataclass(frozen=True)
class TokenKV:
    """KV of n tokens, read a layer at a time.

    Attributes
    ----------
    layer : callable
        Layer index -> keys and values [n, kv_heads, head_dim].
    positions : Tensor [n], int64, on the host
        Positions that the keys are rotated at.
    """

    layer: Callable[[int], tuple[Tensor, Tensor]]
    positions: Tensor

    @classmethod
    def of_rows(cls, kv: KVBuffer, positions: Sequence[int], start: int, end: int, device: torch.device) -> "TokenKV":
        """Rows [start, end) of a KV buffer; `positions` are those of all of its rows."""
        rows = torch.arange(start, end, device=device)
        return cls(lambda layer: kv.read(layer, rows), tensor_of(positions[start:end]))

    @classmethod
    def of_chunk(cls, chunk: ChunkKV, device: torch.device) -> "TokenKV":
        """All tokens of a chunk."""
        return cls(lambda layer: (chunk.k[layer].to(device), chunk.v[layer].to(device)), chunk.positions.cpu())


def remembered_deviation(
    model: ModelAdapter,
    here: TokenKV,
    reference: TokenKV,
    of: Tensor | None = None,
    reduce: Reduce | None = None,
) -> Tensor:
    """Scores, float32 [m], on the host, at least 0; not finite where the KV is not. Waits for the device.

    Parameters
    ----------
    here : TokenKV
        KV in the prompt of the m scored tokens.
    reference : TokenKV
        KV in the reference context of all n tokens of the chunk.
    of : Tensor [m], int64, optional
        Indices of the scored tokens in the chunk, ascending; all of them by default.
    reduce : callable, optional
        Sums over tensor-parallel ranks, float32 [x] -> [x]; the model's `reduce_scores` by default.

    Notes
    -----
    All ranks of tensor parallelism call this together: `reduce` is called once, after all of the rank's own work.
    """
    n = len(reference.positions)
    of = torch.arange(n) if of is None else of
    turn = here.positions - reference.positions[of]
    by = send(turn, model.device) if model.rotates and bool(turn.any()) else None
    index = send(of, model.device) if len(of) < n else None
    sums = torch.cat([_sums(model, layer, here, reference, index, by) for layer in range(model.num_layers)])
    totals = (reduce or model.reduce_scores)(sums).view(2 * model.num_layers, -1)
    return (n * totals[:, :-1] / totals[:, -1:].clamp_min(_LEAST)).sum(0).cpu()


def _sums(
    model: ModelAdapter, layer: int, here: TokenKV, reference: TokenKV, index: Tensor | None, by: Tensor | None
) -> Tensor:
    """Sums over this rank's heads, for keys, then values: m squared distances, then the reference's squared norm.

    float32 [2 * (m + 1)].
    """
    parts = []
    for name, fresh, cached in zip("kv", here.layer(layer), reference.layer(layer), strict=True):
        norm = squared_norm(cached).sum()
        cached = cached if index is None else cached[index]
        if name == "k" and by is not None:
            cached = model.rotaries[layer].rotate(cached.float(), by)  # float32: rounding is no deviation
        parts += [deviation(fresh, cached), norm[None]]
    return torch.cat(parts)


class Contrast:
    """The context against which a prompt's fixed chunks are scored: the one that their encoding does not use.

    KV encoded in the prompt is compared with the chain of fixed text alone; KV of any other encoding with the prompt.
    The other context is prefilled exactly, up to its last chunk, once, at the first comparison.

    Parameters
    ----------
    plan : Plan
        The prompt's plan.
    in_prompt : bool
        The encoding's `in_prompt`.
    prefill : callable
        (token ids, positions, known pieces, slots) -> exact KV and the positions of its rows.
    served : (KVBuffer, sequence of int), optional
        Exact KV of the prompt and the positions of its rows, if available.
    reduce : callable, optional
        See `remembered_deviation`.
    """

    def __init__(
        self,
        model: ModelAdapter,
        plan: Plan,
        in_prompt: bool,
        prefill: Callable[..., Context],
        served: Context | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        self.model, self.plan, self.in_prompt, self.prefill, self.reduce = model, plan, in_prompt, prefill, reduce
        self.context = None if in_prompt else served
        starts = [c.start for c in plan.chunks]
        starts = fixed_before(plan.prompt, starts) if in_prompt else starts
        self.rows = [(start, start + len(c)) for start, c in zip(starts, plan.chunks, strict=True)]

    def scores(self, number: int, own: TokenKV) -> Tensor | None:
        """Scores, float32 [n], on the host, of the plan's chunk `number`, whose KV as encoded is `own`.

        None where KV is not finite: such tokens cannot be ranked.
        """
        start, end = self.rows[number]
        if self.same(number, int(own.positions[0])):
            return torch.zeros(end - start)
        kv, positions = self._other()
        other = TokenKV.of_rows(kv, positions, start, end, self.model.device)
        here, reference = (own, other) if self.in_prompt else (other, own)
        scores = remembered_deviation(self.model, here, reference, reduce=self.reduce)
        return scores if bool(scores.isfinite().all()) else None

    def same(self, number: int, position: int) -> bool:
        """Whether a chunk encoded from `position` on has the same KV in both contexts: no updated text before it.

        The chunk may have been encoded in another prompt than the plan's, so `position` is needed.
        """
        return self.in_prompt and position == self.rows[number][0]

    @property
    def ready(self) -> bool:
        """Whether the other context has been prefilled."""
        return self.context is not None

    def prepare(self) -> None:
        """Prefill the other context now."""
        self._other()

    def _other(self) -> Context:
        if self.context is None:
            prompt, end = self.plan.prompt, self.rows[-1][1]
            if self.in_prompt:
                self.context = self.prefill(fixed_text(prompt)[:end], range(end), (), slots_between(prompt))
            else:
                ids, positions = prompt.token_ids[:end], self.plan.positions[:end]
                self.context = self.prefill(ids, positions, (), slots_in(prompt))
        return self.context


def fixed_before(prompt: Prompt, rows: Sequence[int]) -> list[int]:
    """Number of fixed tokens before each of `rows`: the row's index in the chain of fixed text."""
    parts = [torch.full((len(s.token_ids),), s.role is Role.REUSE) for s in prompt.segments]
    count = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(parts).cumsum(0)])
    return count[tensor_of(rows)].tolist()
