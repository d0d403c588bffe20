"""What the executor needs from a model: five steps of a decoder layer, and a KV buffer to write into.

Two hosts implement it: the reference Llama of this package, and the model a serving engine has loaded.
Rows of several requests are packed along one axis; `RowGroup` says whose they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

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
    """The rows [n] of one request (ascending) that take part in a packed call, and that request's KV."""

    kv: KVBuffer
    rows: Tensor


class ModelAdapter(Protocol):
    """A decoder-only transformer, one step at a time. n rows are packed over all requests of the call."""

    num_layers: int
    rotary: Rotary
    ranks: int  # tensor-parallel ranks that share the heads

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids [n] -> hidden states [n, hidden_size]."""
        ...

    def qkv(self, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Norm, projections and rotation: hidden [n, hidden_size], positions [n] -> q [n, heads, head_dim], k, v."""
        ...

    def attend(self, layer: int, q: Tensor, groups: Sequence[RowGroup]) -> Tensor:
        """Attention of each row over the rows up to its own in its request's KV: [n, heads, head_dim] -> same."""
        ...

    def finish(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        """Output projection, residuals and MLP: -> hidden [n, hidden_size], the next layer's input.

        `hidden` is used up: an adapter may overwrite it.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: hidden [n, hidden_size] -> logits [n, vocab_size], float32."""
        ...

    def reduce_scores(self, scores: Tensor) -> Tensor:
        """Sum deviations [n] over tensor-parallel ranks, so that all ranks select the same rows."""
        ...
