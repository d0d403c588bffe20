"""A reuse policy is four choices, each a protocol: keying, encoding, placement, correction; and maybe a memory.

A new rule is one file with a class that answers a protocol's questions; nothing else asks for its type.
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
    """In what context a chunk's KV is computed.

    Attributes
    ----------
    name : str
        Part of every chunk key, and the name of the caches a workflow builds.
    in_prompt : bool
        The KV is that of the prompt the chunk stands in, so that it may be copied out of a served request.
    at_slot : bool
        The positions are those of a schema with slots.
    position_free : bool
        No position of the prompt enters the KV.
    separate : bool
        Chunks are computed one by one: none needs another, and a job may be split between steps.
    """

    name: str
    in_prompt: bool
    at_slot: bool
    position_free: bool
    separate: bool

    def check(self, keying: Keying) -> None:
        """Raise PolicyError where KV of this context may not be served under `keying`."""
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
        """Compute the missing chunks with `encoder.prefill` (a `ChunkEncoder`), which stores each as it comes.

        Yields the chunk's number in `chunks`, the `ExactKV` that holds it, and its first row and end row there.
        """
        ...


class CorrectionRun(Protocol):
    """A correction at work on one request, as long as its prefill lasts."""

    def enter(self, layer: int, *states: Tensor) -> tuple[Tensor, ...]:
        """Before a layer's attention: hidden [n, hidden_size], q, k, v [n, ...] of the active tokens -> the same.

        It may change which tokens are active (`ActiveTokens.activate_chosen`) and what K and V they write.
        """
        ...

    def leave(self, layer: int, hidden: Tensor) -> Tensor:
        """After a layer: hidden [n, hidden_size] of the active tokens -> of those that go on."""
        ...


class Correction(Protocol):
    """Which reused tokens are recomputed, and what happens to them on the way.

    Attributes
    ----------
    first_layer : int
        The first layer at which cached KV is read.
    selection_layer : int or None
        The layer whose KV decides, None where none does.
    probe_layers : frozenset of int
        Layers whose inputs the chunks must hold.
    total_ratio : float or None
        Share of the reused tokens recomputed in the end; None where the rule names no share.
    needs_scores : bool
        Whether the rule reads `ReusedTokens.scores`, so that chunks are kept with their remembered deviation.
    asks : bool
        Whether the rule looks at the prompt's question, so that every question needs a prefill of its own.
    """

    first_layer: int
    selection_layer: int | None
    probe_layers: frozenset[int]
    total_ratio: float | None
    needs_scores: bool
    asks: bool

    def check(self, name: str, layers: int) -> None:
        """Raise PolicyError, naming the system `name`, where a model of `layers` layers cannot run the rule."""
        ...

    def at_layer(self, layer: int) -> "Correction":
        """The same rule deciding at `layer` (itself where no layer decides)."""
        ...

    def at_ratio(self, ratio: float) -> "Correction":
        """The same rule recomputing `ratio` of the reused tokens (itself where it recomputes none)."""
        ...

    def known_before_start(self, reused: ReusedTokens) -> Tensor | None:
        """Bool [R], on the host: the reused tokens recomputed from layer 0; None where more than this must be known."""
        ...

    def choose(self, request: Any, model: Any) -> Tensor | None:
        """Indices [C], int64, ascending: the reused tokens recomputed from layer 0; None where a layer decides.

        Asked where `known_before_start` gives None, with the `PrefillRequest` and the `DecoderSteps` it runs on: a rule
        may look into the cached KV, and compute, before any layer of the request runs. It writes no KV of the request.
        """
        ...

    def begin(self, tokens: Any) -> CorrectionRun:
        """The rule at work on one request's `ActiveTokens`."""
        ...


def unchanged(prompt: Prompt) -> Prompt:
    """The prompt transform of every policy but window padding."""
    return prompt


@dataclass(frozen=True)
class ReusePolicy:
    """One system of the study.

    `transform` rewrites the prompt before anything else (window padding); `title` is what figures print; `memory` is
    what is kept beside chunks.
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
        """Whether anything can ever match."""
        return self.keying.matches

    @property
    def kind(self) -> str:
        """What its chunks hold, as part of their keys: in what context their KV is, and what is kept beside it."""
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
        """Whether every question needs a prefill of its own."""
        return self.correction.asks

    @property
    def copyable(self) -> bool:
        """Whether chunks may be copied out of a request's KV: theirs is that of the prompt, and nothing beside it."""
        return self.encoding.in_prompt and not self.probe_layers and not self.memory.name

    def at_layer(self, layer: int) -> "ReusePolicy":
        """The same policy selecting at `layer`; promotion layers below it move up to it."""
        return replace(self, correction=self.correction.at_layer(layer))

    def at_ratio(self, ratio: float) -> "ReusePolicy":
        """The same policy recomputing `ratio` of the reused rows (where it recomputes any)."""
        return replace(self, correction=self.correction.at_ratio(ratio))

    def check(self, layers: int) -> None:
        """Raise PolicyError for a model of `layers` layers that cannot run this system."""
        self.correction.check(self.name, layers)
