"""A reuse policy combines keying, encoding, placement and correction, each a protocol, and optionally a memory.

A new rule is one file with a class that implements a protocol; no other code checks its type.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from cacheslide.core.keys import ChunkKey, Keying, NoKeying
from cacheslide.core.placement import Placement
from cacheslide.core.prompt import Chunk, Prompt
from cacheslide.core.reused import ReusedTokens
from cacheslide.errors import PolicyError
from cacheslide.policies.encodings import Encoded, InPrompt
from cacheslide.policies.memory import Memory, NoMemory
from cacheslide.policies.none import NoCorrection


class Encoding(Protocol):
    """The context in which a chunk's KV is computed.

    Attributes
    ----------
    name : str
        Part of every chunk key, and the name of the caches that a workflow builds.
    in_prompt : bool
        The KV is computed in the chunk's prompt, so that it may be copied out of a served request.
    at_slot : bool
        Positions are those of a schema with slots.
    position_free : bool
        The KV does not depend on positions of the prompt.
    separate : bool
        Chunks are computed independently, so that a job may be split between steps.
    """

    name: str
    in_prompt: bool
    at_slot: bool
    position_free: bool
    separate: bool

    def check(self, keying: Keying) -> None:
        """Raise PolicyError if KV of this context may not be served under `keying`."""
        ...

    def tokens(self, chunks: Sequence[Chunk], missing: Sequence[bool]) -> int:
        """Tokens that a prefill of the missing chunks computes."""
        ...

    def encode(
        self,
        encoder: Any,
        prompt: Prompt,
        positions: Sequence[int],
        chunks: Sequence[Chunk],
        keys: Sequence[ChunkKey],
        missing: Sequence[bool],
    ) -> Iterator[Encoded]:
        """Compute the missing chunks with `encoder.prefill` (a `ChunkEncoder`), which stores each as it is computed.

        Yields the chunk's index in `chunks`, the `ExactKV` that holds it, and its first row and end row there.
        """
        ...


class CorrectionRun(Protocol):
    """A correction of one request, for the duration of its prefill."""

    def enter(self, layer: int, *states: Tensor) -> tuple[Tensor, ...]:
        """Before a layer's attention: hidden [n, hidden_size], q, k, v [n, ...] of the active tokens -> the same.

        It may change which tokens are active (`ActiveTokens.activate_chosen`) and what K and V they write.
        """
        ...

    def leave(self, layer: int, hidden: Tensor) -> Tensor:
        """After a layer: hidden [n, hidden_size] of the active tokens -> of the next layer's active tokens."""
        ...


class Correction(Protocol):
    """Selects the reused tokens to recompute, and merges their KV layer by layer.

    Attributes
    ----------
    first_layer : int
        The first layer at which cached KV is read.
    selection_layer : int or None
        The layer whose KV determines the selection; None without one.
    probe_layers : frozenset of int
        Layers whose inputs the chunks must hold.
    total_ratio : float or None
        Share of the reused tokens that is recomputed in total; None for a rule without a fixed share.
    needs_scores : bool
        Whether the rule reads `ReusedTokens.scores`, so that chunks are kept with their remembered deviation.
    asks : bool
        Whether the selection depends on the prompt's question, so that every question needs a prefill of its own.
    """

    first_layer: int
    selection_layer: int | None
    probe_layers: frozenset[int]
    total_ratio: float | None
    needs_scores: bool
    asks: bool

    def check(self, name: str, layers: int) -> None:
        """Raise PolicyError, naming the system `name`, if a model of `layers` layers cannot run the rule."""
        ...

    def at_layer(self, layer: int) -> "Correction":
        """The same rule with selection layer `layer` (itself without a selection layer)."""
        ...

    def at_ratio(self, ratio: float) -> "Correction":
        """The same rule recomputing `ratio` of the reused tokens (itself where it recomputes none)."""
        ...

    def known_before_start(self, reused: ReusedTokens) -> Tensor | None:
        """Bool [R], on the host: the reused tokens recomputed from layer 0; None if they depend on more."""
        ...

    def choose(self, request: Any, model: Any) -> Tensor | None:
        """Indices [C], int64, ascending: the reused tokens recomputed from layer 0; None with a selection layer.

        Called if `known_before_start` returns None, with the `PrefillRequest` and its `DecoderSteps`, before any layer
        of the request runs. A rule may read the cached KV and compute; it writes no KV of the request.
        """
        ...

    def begin(self, tokens: Any) -> CorrectionRun:
        """A run of the rule on one request's `ActiveTokens`."""
        ...


def unchanged(prompt: Prompt) -> Prompt:
    """The prompt transform of every policy but window padding."""
    return prompt


@dataclass(frozen=True)
class ReusePolicy:
    """One system of the study.

    `transform` rewrites the prompt before planning (window padding); `title` is the label in figures; `memory` keeps
    notes beside chunks.
    """

    name: str
    title: str
    keying: Keying = field(default_factory=NoKeying)
    encoding: Encoding = field(default_factory=InPrompt)
    placement: Placement = field(default_factory=Placement)
    correction: Correction = field(default_factory=NoCorrection)
    transform: Callable[[Prompt], Prompt] = unchanged
    memory: Memory = field(default_factory=NoMemory)

    def __post_init__(self) -> None:
        try:
            self.encoding.check(self.keying)
        except PolicyError as wrong:
            raise PolicyError(f"{self.name}: {wrong}") from None
        if self.encoding.at_slot and not self.placement.slot:
            raise PolicyError(f"{self.name}: encoding at slots needs a placement with slots")

    @property
    def reuses(self) -> bool:
        """Whether the policy reuses KV at all."""
        return self.keying.matches

    @property
    def kind(self) -> str:
        """Kind of its chunks, part of their keys: the context of their KV, and the notes kept beside it."""
        return f"{self.encoding.name}+{self.memory.name}" if self.memory.name else self.encoding.name

    @property
    def recipe(self) -> str:
        """Names the chunk caches this policy reads; policies of equal recipe share them."""
        if not self.reuses:
            return "none"
        slot = f"_slot{self.placement.slot}" if self.placement.slot else ""
        moved = "" if self.transform is unchanged else f"_{self.name}"
        return f"{self.keying.name}_{self.kind}{slot}{moved}"

    @property
    def probe_layers(self) -> frozenset[int]:
        """Layers whose inputs its chunks must hold."""
        return self.correction.probe_layers

    @property
    def needs_scores(self) -> bool:
        """Whether its chunks are kept with their remembered deviation."""
        return self.correction.needs_scores

    @property
    def asks(self) -> bool:
        """See `Correction.asks`."""
        return self.correction.asks

    @property
    def copyable(self) -> bool:
        """Whether chunks may be copied out of a request's KV: they are encoded in the prompt and have no notes."""
        return self.encoding.in_prompt and not self.probe_layers and not self.memory.name

    def at_layer(self, layer: int) -> "ReusePolicy":
        """The same policy selecting at `layer`; promotion layers below it move up to it."""
        return replace(self, correction=self.correction.at_layer(layer))

    def at_ratio(self, ratio: float) -> "ReusePolicy":
        """The same policy recomputing `ratio` of the reused rows (itself if it recomputes none)."""
        return replace(self, correction=self.correction.at_ratio(ratio))

    def check(self, layers: int) -> None:
        """Raise PolicyError for a model of `layers` layers that cannot run this system."""
        self.correction.check(self.name, layers)
