"""Limits the reuse in a step: requests start in vLLM's order, and a step packs no more than keeps the device busy.

Requests completed in one step all get their first token at its end. Two half steps cost the same, if each has enough
rows to fill the device's matrix products, and half of the requests are done after the first.
"""

from collections.abc import Sequence

from cacheslide.core.keys import ChunkKey
from cacheslide.core.prompt import Chunk
from cacheslide.core.reused import ReusedTokens
from cacheslide.policies.base import Correction
from cacheslide.policies.deviation import tokens_of_ratio
from cacheslide.vllm.options import ServerOptions


class Packing:
    """The loads of the step being scheduled.

    Attributes
    ----------
    full : bool
        A request did not fit into this step. Every later one then waits too, so that none overtakes it, including
        requests without annotations: vLLM gives a started prefill all tokens of the next steps before it returns to
        waiting requests.
    """

    def __init__(self, options: ServerOptions) -> None:
        self.completed_limit, self.computed_limit = options.tokens_per_step, options.computed_tokens_per_step
        self.begin()

    def begin(self) -> None:
        """Start a step."""
        self.completed = self.computed = 0
        self.full = False

    def takes(self, completed: int, computed: int) -> bool:
        """Whether a request with `completed` rows by reuse, `computed` of them computed, is added to this step.

        The first request always is, whatever its size.
        """
        within = self.completed + completed <= self.completed_limit and self.computed + computed <= self.computed_limit
        self.full = self.full or bool(self.completed and not within)
        if not self.full:
            self.completed, self.computed = self.completed + completed, self.computed + computed
        return not self.full


def computed_tokens(
    correction: Correction, reuse: Sequence[tuple[ChunkKey, Chunk]], rows: range, limit: int, layers: int
) -> int:
    """Estimate the rows that a load computes, as the mean over the model's `layers`.

    The load completes `rows` from the chunks `reuse` below row `limit`. Text between chunks is computed, and the rule's
    `total_ratio` of the reused tokens. Without a ratio the estimate follows from the runs' lengths, or is all of them
    where scores or layers decide. Layers below `first_layer` compute every row.
    """
    lengths = [n for _, chunk in reuse if (n := min(chunk.end, limit) - max(chunk.start, rows.start)) > 0]
    reused, ratio = sum(lengths), correction.total_ratio
    if ratio is not None:
        chosen = tokens_of_ratio(ratio, reused)
    else:
        known = None if correction.needs_scores else correction.known_before_start(ReusedTokens.of(*lengths))
        chosen = reused if known is None else int(known.sum())
    full, live = correction.first_layer, len(rows) - reused + chosen
    return -(-(full * len(rows) + (layers - full) * live) // layers)
