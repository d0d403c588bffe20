"""How much of a step is reuse: requests begin in vLLM's order, and a step packs no more than keeps the device busy.

Requests that are completed in one step get their first token together, when the last row of all is done. Two half as
large steps cost the same where each has enough rows to fill the device's matrix products, and half of the requests are
done after the first.
"""

from collections.abc import Sequence

from cacheslide.core.keys import ChunkKey
from cacheslide.core.prompt import Chunk
from cacheslide.core.reused import ReusedTokens
from cacheslide.policies.base import Correction
from cacheslide.policies.deviation import tokens_of_ratio
from cacheslide.vllm.options import ServerOptions


class Packing:
    """The loads of the step that vLLM schedules.

    Attributes
    ----------
    full : bool
        A request did not fit into this step. Whatever vLLM asks for behind it waits too, so that none overtakes it:
        requests without annotations as well, since vLLM gives the prefill of one that has begun all tokens of the next
        steps before it comes back to those that wait.
    """

    def __init__(self, options: ServerOptions) -> None:
        self.completed_limit, self.computed_limit = options.tokens_per_step, options.computed_tokens_per_step
        self.begin()

    def begin(self) -> None:
        """A new step."""
        self.completed = self.computed = 0
        self.full = False

    def takes(self, completed: int, computed: int) -> bool:
        """Whether a request of which `completed` rows come by reuse, `computed` of them computed, joins the step.

        The first one always does, however large it is.
        """
        within = self.completed + completed <= self.completed_limit and self.computed + computed <= self.computed_limit
        self.full = self.full or bool(self.completed and not within)
        if not self.full:
            self.completed, self.computed = self.completed + completed, self.computed + computed
        return not self.full


def computed_tokens(
    correction: Correction, reuse: Sequence[tuple[ChunkKey, Chunk]], rows: range, limit: int, layers: int
) -> int:
    """How many rows a load computes, estimated before it starts: the average over the `layers` of the model.

    It completes `rows`, those of the chunks `reuse` before row `limit` from cached KV. Text between them is computed,
    and of the reused tokens the rule's `total_ratio`. Without a ratio it is what lengths alone say, and all of them
    where scores or layers decide. Layers in front of `first_layer` compute every row.
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
