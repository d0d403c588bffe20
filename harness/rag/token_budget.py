"""Token budgets: what a number of tokens, or of bytes of KV, holds of a sample's ranked passages."""

from collections.abc import Sequence
from dataclasses import dataclass

from cacheslide.models.adapter import ModelAdapter
from harness.rag.prompts import SamplePrompts


@dataclass(frozen=True)
class TokenBudgetCalculator:
    """Sizes of one model's KV.

    Attributes
    ----------
    bytes_per_token : int
        2 x layers x KV heads x head dimension x bytes an element: keys and values of one token.
    """

    bytes_per_token: int

    @classmethod
    def of(cls, model: ModelAdapter) -> "TokenBudgetCalculator":
        """The calculator of `model`, in its own dtype."""
        return cls(2 * model.num_layers * model.num_kv_heads * model.head_dim * model.dtype.itemsize)

    def tokens_in(self, nbytes: int) -> int:
        """Tokens whose KV fits in `nbytes` bytes."""
        return nbytes // self.bytes_per_token

    def bytes_of(self, tokens: int) -> int:
        """Bytes of the KV of `tokens` tokens."""
        return tokens * self.bytes_per_token


def fitting(prompts: SamplePrompts, ranked: Sequence[int], budget: int) -> list[int]:
    """The first ranked passages whose prompt, head and question included, has at most `budget` tokens.

    Stops at the first passage that does not fit, so that a larger budget never holds other passages instead.
    """
    chosen: list[int] = []
    for passage in ranked:
        if prompts.length([*chosen, passage]) > budget:
            break
        chosen.append(passage)
    return chosen
