"""What a prefix cache over all requests serves: shared system prompts and demonstrations, beside a session's own."""

from collections.abc import Sequence

BLOCK = 16  # tokens; vLLM's prefix cache keeps whole blocks of this many


class PrefixCache:
    """The prompts seen so far as a trie of whole blocks; nothing is evicted."""

    def __init__(self, block: int = BLOCK) -> None:
        self.block = block
        self._nodes: dict[tuple[int, tuple[int, ...]], int] = {}

    def serve(self, ids: Sequence[int]) -> int:
        """How many leading tokens of a prompt stand in an earlier one, in whole blocks; the prompt is kept."""
        served, node, known = 0, 0, True
        for start in range(0, len(ids) - self.block + 1, self.block):
            edge = node, tuple(ids[start : start + self.block])
            known = known and edge in self._nodes
            served += self.block * known
            node = self._nodes.setdefault(edge, len(self._nodes) + 1)
        return served
