"""A prefix cache over all requests, which also serves system prompts and demonstrations shared between sessions."""

from collections.abc import Sequence

BLOCK = 16  # tokens per block, as in vLLM's prefix cache


class PrefixCache:
    """The prompts seen so far as a trie of whole blocks; nothing is evicted."""

    def __init__(self, block: int = BLOCK) -> None:
        self.block = block
        self._nodes: dict[tuple[int, tuple[int, ...]], int] = {}

    def serve(self, ids: Sequence[int]) -> int:
        """Number of leading tokens cached from earlier prompts, in whole blocks; adds the prompt to the cache."""
        served, node, known = 0, 0, True
        for start in range(0, len(ids) - self.block + 1, self.block):
            edge = node, tuple(ids[start : start + self.block])
            known = known and edge in self._nodes
            served += self.block * known
            node = self._nodes.setdefault(edge, len(self._nodes) + 1)
        return served
