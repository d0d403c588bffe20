"""What the engine needs from a model: the steps of a decoder layer, a KV buffer to write into, its shape and name.

Two hosts implement it: the reference decoder of this package, and the model a serving engine has loaded.
Rows of several requests are packed along one axis; `RowGroup` says whose they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from cacheslide.errors import PolicyError
from cacheslide.positions.ccpe import PromptSlots
from cacheslide.positions.rope import Rotary


class KVBuffer(Protocol):
    """The KV cache of one request, addressed by row (the token's index in the prompt)."""

    def write(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Store keys and values [n, kv_heads, head_dim] (keys rotated) at `rows` [n]."""
        ...

    def read(self, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [n, kv_heads, head_dim] at `rows` [n]."""
        ...


@dataclass(frozen=True)
class RowGroup:
    """The rows [n] of one request (ascending) that take part in a packed call, and that request's KV.

    With `narrow` [n] (bool), those that are set attend to the rows `open` [m] (ascending) up to their own, and to
    themselves, alone. A model that cannot do that refuses it.
    """

    kv: KVBuffer
    rows: Tensor
    narrow: Tensor | None = None
    open: Tensor | None = None

    @cached_property
    def rows_on_host(self) -> Tensor:
        """`rows` in host memory: attention that plans by them waits for the device once, not in every layer."""
        return self.rows.cpu()


def refuse_narrow(groups: Sequence[RowGroup]) -> None:
    """For models whose attention cannot narrow a query's keys: PolicyError where a group asks for it."""
    if any(g.narrow is not None for g in groups):
        raise PolicyError("attention to updated text alone (attends='updated') runs in the reference host only")


def write_each(layer: int, groups: Sequence[RowGroup], k: Tensor, v: Tensor) -> None:
    """`DecoderSteps.write`, request after request."""
    sizes = [len(g.rows) for g in groups]
    for group, keys, values in zip(groups, k.split(sizes), v.split(sizes), strict=True):
        if len(group.rows):
            group.kv.write(layer, group.rows, keys, values)


class DecoderSteps(Protocol):
    """A decoder-only transformer, one step at a time: what the executor calls. n rows are packed over all requests.

    Attributes
    ----------
    num_layers : int
    ranks : int
        Tensor-parallel ranks that share the heads.
    """

    num_layers: int
    ranks: int

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids [n] -> hidden states [n, hidden_size]."""
        ...

    def qkv(self, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Norm, projections and rotation: hidden [n, hidden_size], positions [n] -> q [n, heads, head_dim], k, v."""
        ...

    def write(self, layer: int, groups: Sequence[RowGroup], k: Tensor, v: Tensor) -> None:
        """Store the packed rows' keys and values [n, kv_heads, head_dim], each request's in its KV."""
        ...

    def attend(self, layer: int, q: Tensor, groups: Sequence[RowGroup]) -> Tensor:
        """Attention of each row over the rows up to its own in its request's KV: [n, heads, head_dim] -> same.

        Where the layer has a sliding window, over the last rows of that many, cached or not.
        """
        ...

    def finish(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        """Output projection, residuals and MLP: -> hidden [n, hidden_size], the next layer's input.

        `hidden` is used up: an adapter may overwrite it.
        """
        ...

    def reduce_scores(self, scores: Tensor) -> Tensor:
        """Sum deviations [n] over tensor-parallel ranks, so that all ranks select the same rows."""
        ...


@runtime_checkable
class ModelAdapter(DecoderSteps, Protocol):
    """A model that prompts are served with and chunks are encoded with.

    Attributes
    ----------
    model_id : str
        Names the weights in chunk keys: models of one id compute the same KV.
    dtype, device
        Of hidden states and KV.
    num_kv_heads : int
        This rank's.
    head_dim, hidden_size : int
    max_positions : int
        Position indices lie below it.
    rotaries : sequence of Rotary
        One a layer: turns keys from one position to another. Layers of one rotation share one object.
    rotates : bool
        Whether keys depend on their position; those that do not serve wherever they are.
    """

    model_id: str
    dtype: torch.dtype
    device: torch.device | str
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    max_positions: int
    rotaries: Sequence[Rotary]
    rotates: bool

    def new_kv(self, capacity: int) -> KVBuffer:
        """An empty KV buffer of `capacity` rows."""
        ...

    def describe(self, kv: KVBuffer, slots: PromptSlots) -> None:
        """Tell `kv` where its prompt's updated slots lie; nothing to most models.

        PromptError for more slots than the model knows.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: hidden [n, hidden_size] -> logits [n, vocab_size], float32."""
        ...
