"""A light proxy of relevance: which passages the text so far will make the retriever ask for, from token ids alone."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Protocol


class Proxy(Protocol):
    """Scores a sample's passages for a text, cheaply enough to run between two decoded tokens."""

    def scores(self, token_ids: Sequence[int]) -> list[float]:
        """Expected relevance of every passage to the text `token_ids`; 0 or less: not worth promoting."""
        ...


class TokenOverlap:
    """Sum, over the tokens that a text and a passage share, of log(passages / passages that hold the token).

    Tokens of every passage count nothing, so common words do not. It reads no text, needs no index and no model.

    Parameters
    ----------
    passages : sequence of sequence of int
        Token ids of the passages.
    """

    def __init__(self, passages: Sequence[Sequence[int]]) -> None:
        self.tokens = [frozenset(p) for p in passages]
        holding = Counter(t for tokens in self.tokens for t in tokens)
        self.weight = {t: math.log(len(self.tokens) / n) for t, n in holding.items()}

    def scores(self, token_ids: Sequence[int]) -> list[float]:
        """See `Proxy.scores`."""
        asked = frozenset(token_ids)
        return [math.fsum(self.weight[t] for t in asked & tokens) for tokens in self.tokens]
