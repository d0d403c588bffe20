"""One prompt to complete: its tokens, its KV buffer, the source of its cached KV, and the output of a run."""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from cacheslide.core.reused import ReusedTokens
from cacheslide.models.adapter import KVBuffer
from cacheslide.policies.base import Correction
from cacheslide.policies.none import NoCorrection


class KVSource(Protocol):
    """Cached KV of a request's reused rows, moved to where those rows sit in this prompt."""

    def layer(self, layer: int, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values [n, kv_heads, head_dim] of the reused rows, or of those at `index`."""
        ...

    def place(self, layer: int, index: Tensor, kv: KVBuffer, rows: Tensor) -> None:
        """Write the reused rows at `index` [n] into `kv` at `rows` [n]; later layers may be written too."""
        ...

    def deviation(self, layer: int, index: Tensor, k: Tensor, v: Tensor, metric: str) -> Tensor:
        """Deviation, float32 [n], of fresh k, v [n, kv_heads, head_dim] from the reused rows at `index`."""
        ...

    def inputs(self, layer: int, index: Tensor) -> Tensor | None:
        """Cached layer inputs [n, hidden_size] of the reused rows at `index`; None where they were not stored."""
        ...


@dataclass
class PrefillRequest:
    """One prompt to complete.

    Attributes
    ----------
    token_ids, positions : Tensor [T], int64
        The tokens of rows `start`, `start` + 1, ... and their position indices.
    kv : KVBuffer
        Receives every row's KV; rows below `start` are filled already.
    reused : Tensor [R], int64
        Ascending local rows (0-based from `start`) with cached KV in `source`.
    runs : ReusedTokens
        The reused runs, whose rows are `reused`, and the remembered scores of their tokens.
    """

    token_ids: Tensor
    positions: Tensor
    kv: KVBuffer
    reused: Tensor
    source: KVSource | None = None
    correction: Correction = field(default_factory=NoCorrection)
    runs: ReusedTokens = field(default_factory=ReusedTokens)
    start: int = 0


@dataclass
class PrefillOutput:
    """Output of a run beside the KV.

    `tokens_computed[l]` counts rows whose attention and MLP ran in layer l; `selected` [S] are the reused rows (local)
    recomputed after the last change; `alpha[l]` is the mean fusion weight; `layer_inputs[l]` [T, hidden_size] are
    captured inputs; `active` [n] and `final` [n, hidden_size] are the rows that ran to the end and their final states.
    """

    rows: int
    tokens_computed: list[int]
    selected: Tensor
    alpha: dict[int, float]
    layer_inputs: dict[int, Tensor]
    active: Tensor
    final: Tensor | None = None

    @property
    def hidden(self) -> Tensor | None:
        """The last row's final state [hidden_size]; None when that row was not active. Waits for the device."""
        ends_active = len(self.active) and int(self.active[-1]) == self.rows - 1
        return self.final[-1] if ends_active else None
