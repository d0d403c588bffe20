"""Runs of all tensor-parallel ranks together: all ranks complete a run or none does, and a fault blocks no other rank.

Inside a run every layer sums its output over the ranks. A rank that fails inside takes part in the remaining sums with
zeros, so that the others do not hang; then all ranks discard the run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cacheslide.core.prefill_request import PrefillOutput, PrefillRequest
from cacheslide.core.selective_prefill import SelectivePrefill
from cacheslide.core.static_prefill import StaticPrefill
from cacheslide.errors import CacheSlideError


class PeerFault(CacheSlideError, RuntimeError):
    """Another rank failed at work that succeeded on this rank."""


class Team:
    """The ranks that share a model; without `group`, this rank alone.

    Parameters
    ----------
    group : vLLM's GroupCoordinator, optional
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group if group is not None and group.world_size > 1 else None
        self.entered = False  # whether this rank has reached its unit's run

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """For each of `flags`, whether it is set on all ranks. Waits for the other ranks, not for the device."""
        if self.group is None or not flags:
            return list(flags)
        agreed = torch.tensor([int(f) for f in flags], dtype=torch.int32)
        torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MIN, group=self.group.cpu_group)
        return [bool(x) for x in agreed.tolist()]

    def alike(self, numbers: Sequence[int]) -> list[bool]:
        """For each of `numbers` (63 bits, same order on each rank), whether all ranks agree; waits like `agree`."""
        if self.group is None or not numbers:
            return [True] * len(numbers)
        both = torch.tensor([list(numbers), [-x for x in numbers]], dtype=torch.int64)
        torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MIN, group=self.group.cpu_group)
        return (both[0] == -both[1]).tolist()

    def summing(self, reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """`reduce` for one sum in a unit of its own: done on all ranks, or raises on all of them."""

        def summed(sums: Tensor) -> Tensor:
            self.entered = True
            if not self.agree([True])[0]:
                raise PeerFault("another rank has nothing to add to the sum")
            if self.group is None:
                return reduce(sums)
            error, out = None, sums
            with _counted(self.group) as done:
                try:
                    out = reduce(sums)
                except Exception as raised:
                    error = raised
            if error is not None and not done:
                with suppress(Exception):  # whatever stops it stops the others at the same place
                    self.group.all_reduce(torch.zeros_like(sums))  # the other ranks wait for this rank's part
            if not self.agree([error is None])[0]:
                raise error or PeerFault("another rank failed at the sum")
            return out

        return summed

    @contextmanager
    def unit(self) -> Iterator[None]:
        """Context of what leads to one run: a rank that fails before the run reports it where the others wait."""
        self.entered = False
        try:
            yield
        except Exception:
            if not self.entered:
                self.agree([False])
            raise


class TeamPrefill(SelectivePrefill):
    """`SelectivePrefill` by all ranks of a team. Raises on all of them if one has failed."""

    def __init__(self, model: Any, team: Team, mlp_rows: int, static: StaticPrefill | None = None) -> None:
        super().__init__(model, static)
        self.team, self.mlp_rows = team, mlp_rows

    @torch.inference_mode()
    def run(self, requests: Sequence[PrefillRequest], capture: frozenset[int] = frozenset()) -> list[PrefillOutput]:
        """See `SelectivePrefill.run`."""
        team = self.team
        team.entered = True
        if team.group is None:
            return self.compute(requests, capture)
        if not team.agree([True])[0]:
            raise PeerFault("another rank could not prepare the run")
        error, outputs = None, []
        with _counted(team.group) as sums:
            try:
                outputs = self.compute(requests, capture)
            except Exception as raised:
                error = raised
        if error is not None:
            with suppress(Exception):  # any failure here happens on the other ranks at the same place
                self._keep_appointments(requests, sums)
        if not team.agree([error is None])[0]:
            raise error or PeerFault("another rank failed within the run")
        return outputs

    def compute(self, requests: Sequence[PrefillRequest], capture: frozenset[int] = frozenset()) -> list[PrefillOutput]:
        """The run itself on this rank."""
        return super().run(requests, capture)

    def _keep_appointments(self, requests: Sequence[PrefillRequest], sums: list[Tensor | None]) -> None:
        """Take part in the remaining sums of a run over `requests`; `sums` are those already done."""
        hollow = [replace(r, kv=_Nowhere(self.model), source=_Zeros(r, self.model)) for r in requests]
        SelectivePrefill(_Hollow(self.model, self.team.group, sums, self.mlp_rows)).run(hollow)


@contextmanager
def _counted(group: Any) -> Iterator[list[Tensor | None]]:
    """Record the sums over `group`: results of scores, None for hidden states."""
    done: list[Tensor | None] = []
    plain = group.all_reduce

    def all_reduce(x: Tensor) -> Tensor:
        out = plain(x)
        done.append(out if out.dim() == 1 else None)
        return out

    group.all_reduce = all_reduce
    try:
        yield done
    finally:
        del group.all_reduce


class _Hollow:
    """`DecoderSteps` that compute nothing and only take part in the ranks' sums."""

    def __init__(self, model: Any, group: Any, done: Sequence[Tensor | None], mlp_rows: int) -> None:
        self.model, self.group, self.done, self.mlp_rows = model, group, list(done), mlp_rows
        self.num_layers, self.ranks = model.num_layers, model.ranks
        first = model.layers[0].self_attn
        self.heads, self.kv_heads, self.dim = first.num_heads, first.num_kv_heads, first.head_dim

    def _sum(self, x: Tensor) -> Tensor:
        if self.done:
            known = self.done.pop(0)
            return x if known is None else known
        return self.group.all_reduce(x)

    def _rows(self, n: int) -> Tensor:
        return torch.zeros(n, self.model.hidden_size, dtype=self.model.dtype, device=self.model.device)

    def embed(self, token_ids: Tensor) -> Tensor:
        return self._sum(self._rows(len(token_ids)))

    def qkv(self, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (hidden.new_zeros(len(hidden), n, self.dim) for n in (self.heads, self.kv_heads, self.kv_heads))
        return q, k, v

    def write(self, layer: int, groups: Sequence[Any], k: Tensor, v: Tensor) -> None:
        """Does nothing."""

    def attend(self, layer: int, q: Tensor, groups: Sequence[Any]) -> Tensor:
        return q

    def finish(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        self._sum(self._rows(len(hidden)))
        for part in hidden.split(self.mlp_rows):
            self._sum(self._rows(len(part)))
        return hidden

    def reduce_scores(self, scores: Tensor) -> Tensor:
        return self._sum(scores)


class _Nowhere:
    """A KV buffer of zeros that ignores writes."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def read(self, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        model = self.model
        zeros = torch.zeros(len(rows), model.num_kv_heads, model.head_dim, dtype=model.dtype, device=model.device)
        return zeros, zeros

    def write(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Does nothing."""


class _Zeros(SimpleNamespace):
    """A `KVSource` of a request's reused rows, all zero."""

    def __init__(self, request: PrefillRequest, model: Any) -> None:
        shape = model.num_kv_heads, model.head_dim
        super().__init__(request=request, heads=shape, model=model)

    def layer(self, layer: int, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        n = len(self.request.reused) if index is None else len(index)
        zeros = torch.zeros(n, *self.heads, dtype=self.model.dtype, device=self.model.device)
        return zeros, zeros

    def place(self, layer: int, index: Tensor, kv: Any, rows: Tensor) -> None:
        """Does nothing."""

    def deviation(self, layer: int, index: Tensor, k: Tensor, v: Tensor, metric: str) -> Tensor:
        return torch.zeros(len(index), device=self.model.device)

    def inputs(self, layer: int, index: Tensor) -> Tensor | None:
        if self.request.source is None or self.request.source.inputs(layer, index[:0]) is None:
            return None
        return torch.zeros(len(index), self.model.hidden_size, dtype=self.model.dtype, device=self.model.device)
