"""Receipt: what was reused and computed for one request; both hosts give the same."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from cacheslide.core.prefill_request import PrefillOutput
from cacheslide.store.base import ChunkKV


@dataclass
class Receipt:
    """Counts are of the prompt's tokens; bytes are those read from the store.

    `tokens_per_layer` counts the tokens whose attention and MLP ran in each layer. `compute_fraction` is their sum over
    the prompt's tokens times layers: the ideal ratio of prefill times. `generation` is the highest among the reused
    chunks; 0 where all were computed exactly.
    """

    system: str
    tokens: int
    tokens_reused: int = 0
    tokens_recomputed: int = 0
    compute_fraction: float = 1.0
    tokens_per_layer: list[int] = field(default_factory=list)
    chunks: int = 0
    chunks_hit: int = 0
    bytes_loaded: int = 0
    fallback: str = ""
    alpha: dict[int, float] = field(default_factory=dict)
    generation: int = 0

    def hit(self, chunk: ChunkKV) -> None:
        """Count a chunk that the prefill reads."""
        self.chunks_hit += 1
        self.bytes_loaded += chunk.nbytes
        self.generation = max(self.generation, chunk.generation)

    def complete(self, output: PrefillOutput, reused: int, rest: int = 0) -> "Receipt":
        """Fill in a run's output: `reused` rows had cached KV; `rest` rows behind it are computed elsewhere."""
        self.tokens_recomputed = len(output.selected)
        self.tokens_reused = reused - self.tokens_recomputed
        self.alpha = output.alpha
        return self.computed([n + rest for n in output.tokens_computed])

    def computed(self, tokens_per_layer: Sequence[int]) -> "Receipt":
        """Fill in the number of rows that each layer computed."""
        self.tokens_per_layer = list(tokens_per_layer)
        self.compute_fraction = sum(self.tokens_per_layer) / (self.tokens * len(self.tokens_per_layer))
        return self

    def as_dict(self) -> dict:
        """The receipt as a JSON-serialisable dict."""
        return asdict(self)
