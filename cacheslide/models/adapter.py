"""The model interface of the engine: the steps of a decoder layer, KV buffers, the model's shape and name.

Two classes implement it: the reference decoder of this package, and the adapter of the model that vLLM has loaded. Rows
of several requests are packed along one axis; a `RowGroup` gives the rows of one request.
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

    Rows set in `narrow` [n] (bool) attend only to the rows `open` [m] (ascending) up to their own, and to themselves. A
    model without that ability raises PolicyError.
    """

    kv: KVBuffer
    rows: Tensor
    narrow: Tensor | None = None
    open: Tensor | None = None

    @cached_property
    def rows_on_host(self) -> Tensor:
        """`rows` in host memory, copied once: attention that tiles by them then need not wait in every layer."""
        return self.rows.cpu()


def refuse_narrow(groups: Sequence[RowGroup]) -> None:
    """Raise PolicyError if a group has narrowed rows: for models whose attention does not support them."""
    if any(g.narrow is not None for g in groups):
        raise PolicyError("attention to updated text alone (attends='updated') runs in the reference host only")


def write_each(layer: int, groups: Sequence[RowGroup], k: Tensor, v: Tensor) -> None:
    """`DecoderSteps.write` in a loop over requests."""
    sizes = [len(g.rows) for g in groups]
    for group, keys, values in zip(groups, k.split(sizes), v.split(sizes), strict=True):
        if len(group.rows):
            group.kv.write(layer, group.rows, keys, values)


class DecoderSteps(Protocol):
    """The steps of a decoder-only transformer that the executor calls. n rows are packed over all requests.

    Attributes
    ----------
    num_layers : int
    ranks : int
        Number of tensor-parallel ranks that share the heads.
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
        """Write the packed rows' keys and values [n, kv_heads, head_dim] into each request's KV."""
        ...

    def attend(self, layer: int, q: Tensor, groups: Sequence[RowGroup]) -> Tensor:
        """Attention of each row over the rows up to its own in its request's KV: [n, heads, head_dim] -> same.

        In a layer with a sliding window, over the last rows of that number, cached or not.
        """
        ...

    def finish(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        """Output projection, residuals and MLP: -> hidden [n, hidden_size], the next layer's input.

        May overwrite `hidden`.
        """
        ...

    def reduce_scores(self, scores: Tensor) -> Tensor:
        """Sum deviations [n] over tensor-parallel ranks, so that all ranks select the same rows."""
        ...


@runtime_checkable
class ModelAdapter(DecoderSteps, Protocol):
    """A model that serves prompts and encodes chunks.

    Attributes
    ----------
    model_id : str
        Identifies the weights in chunk keys: models with equal ids compute equal KV.
    dtype, device
        Dtype and device of hidden states and KV.
    num_kv_heads : int
        KV heads of this rank.
    head_dim, hidden_size : int
    max_positions : int
        Number of position indices.
    rotaries : sequence of Rotary
        One per layer: rotates keys from one position to another. Layers with one rotation share one object.
    rotates : bool
        Whether keys depend on their position; otherwise cached keys hold at any position.
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
        """Set the prompt's updated slots in `kv`; does nothing for models without slot offsets.

        PromptError for more slots than were calibrated.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: hidden [n, hidden_size] -> logits [n, vocab_size], float32."""
        ...
