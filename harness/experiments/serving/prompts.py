"""Prompts of random ids around the same fixed chunks, for engines measured in this process."""

import random

CHUNKS, REUSED = 8, 0.9
FRONT = (0.4, 0.6)  # least and largest share of the updated text that stands in front of the chunks


class Prompts:
    """Prompts of `tokens` ids around the same eight chunks.

    Parameters
    ----------
    tokens, vocabulary : int
        Ids are drawn from 10 to below `vocabulary`.
    seed : int
    reused : float
        Share of the prompt in fixed text: the chunks and the system prompt.
    system : int
        Tokens of a fixed system prompt in front of the updated text, a chunk of its own; none by default.
    """

    def __init__(self, tokens: int, vocabulary: int, seed: int = 0, reused: float = REUSED, system: int = 0) -> None:
        self.tokens, self.vocabulary, self.random = tokens, vocabulary, random.Random(seed)
        self.reused = reused
        self.system = self._ids(system)
        self.chunks = [self._ids(int((tokens * reused - system) / CHUNKS)) for _ in range(CHUNKS)]

    def _ids(self, count: int) -> list[int]:
        return [self.random.randrange(10, self.vocabulary) for _ in range(count)]

    def turn(self) -> tuple[list[int], list[list[int]]]:
        """A prompt and its fixed spans; 40 to 60 % of the updated text stand in front of the chunks."""
        front = int(self.tokens * (1 - self.reused) * self.random.uniform(*FRONT))
        ids, spans = self.system + self._ids(front), [[0, len(self.system)]] if self.system else []
        for chunk in self.chunks:
            spans.append([len(ids), len(ids) + len(chunk)])
            ids = ids + chunk
        return ids + self._ids(self.tokens - len(ids)), spans

    def shared_prefix(self) -> list[int]:
        """A prompt that begins with all fixed text, the best case of a prefix cache."""
        ids = self.system + [t for chunk in self.chunks for t in chunk]
        return ids + self._ids(self.tokens - len(ids))
