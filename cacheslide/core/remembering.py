"""Remembered deviation: how far each token's KV in a prompt is from its KV in a reference context, over all layers.

score_i = Σ_l ( mean (K_i - K'_i)² / mean K'² + mean (V_i - V'_i)² / mean V'² ), where K, V are of the prompt and K', V'
of the reference; the means above are over heads and head_dim of token i, those below over all tokens of the chunk too.
A score does not depend on where the chunk lies: K' is turned to K's positions first.

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
_LEAST = 1e-30  # of a mean square: a layer that is zero in both contexts scores 0


@dataclass(frozen=True)
class TokenKV:
    """KV of n tokens, read a layer at a time.

    Attributes
    ----------
    layer : callable
        Layer -> keys and values [n, kv_heads, head_dim].
    positions : Tensor [n], int64, on the host
        What the keys are rotated at.
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
        In the prompt: of the m tokens that are scored.
    reference : TokenKV
        In the context that is compared with: of all n tokens of the chunk.
    of : Tensor [m], int64, optional
        Which tokens of the chunk are scored, ascending; all of them by default.
    reduce : callable, optional
        Sums over tensor-parallel ranks, float32 [x] -> [x]; the model's `reduce_scores` by default.

    Notes
    -----
    All ranks of tensor parallelism must call this together: `reduce` is called once, when all of a rank's own work is
    done.
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
    """Of this rank's heads, for keys and then for values: m squared distances and the reference's squared norm.

    float32 [2 * (m + 1)].
    """
    parts = []
    for name, fresh, cached in zip("kv", here.layer(layer), reference.layer(layer), strict=True):
        norm = squared_norm(cached).sum()
        cached = cached if index is None else cached[index]
        if name == "k" and by is not None:
            cached = model.rotaries[layer].rotate(cached.float(), by)  # in float32: rounding is no deviation
        parts += [deviation(fresh, cached), norm[None]]
    return torch.cat(parts)


class Contrast:
    """A prompt's fixed chunks in the context that their encoding does not compute them in: what scores compare with.

    KV encoded in the prompt is compared with the chain of fixed text alone; KV of any other encoding with the prompt.
    That other context is prefilled exactly up to its last chunk, once, when a chunk is first compared with it.

    Parameters
    ----------
    plan : Plan
        Of the prompt.
    in_prompt : bool
        The encoding's.
    prefill : callable
        Token ids, positions, known pieces and slots -> exact KV and the positions of its rows.
    served : (KVBuffer, sequence of int), optional
        Exact KV of the prompt and the positions of its rows, where there is some already.
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

        None where KV is not finite: no token can be ranked by it.
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
        """Whether both contexts of a chunk that was encoded from `position` on are one: no updated text before it.

        It may have been encoded in another prompt than the plan's, so that the plan does not tell.
        """
        return self.in_prompt and position == self.rows[number][0]

    @property
    def ready(self) -> bool:
        """Whether the other context is there: what is compared with it costs no prefill any more."""
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
    """How many fixed tokens stand before each of `rows`: where it lies in the chain of fixed text."""
    parts = [torch.full((len(s.token_ids),), s.role is Role.REUSE) for s in prompt.segments]
    count = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(parts).cumsum(0)])
    return count[tensor_of(rows)].tolist()
