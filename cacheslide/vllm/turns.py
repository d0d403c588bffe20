"""Client-side prompts of a growing conversation: head | updated text | fixed pieces in order | question.

The pieces keep their order while the updated text before them changes length. Question and answer of a turn become a
piece, cut where the receipt says that its KV ends, so that the next turn looks up the stored chunks.
"""

from collections.abc import Sequence
from typing import Any


class Turns:
    """Builds token ids and annotations of every turn.

    Parameters
    ----------
    head : sequence of int
        Fixed tokens that begin every prompt.
    """

    def __init__(self, head: Sequence[int]) -> None:
        self.pieces: list[list[int]] = [list(head)]
        self._open: list[int] = []  # generated, but without KV yet: begins the next question
        self._asked: list[int] = []
        self._start = 0

    def add(self, token_ids: Sequence[int]) -> None:
        """Append fixed text (a document, a tool's permanent answer)."""
        self.pieces += [self._open] if self._open else []
        self._open = []
        self.pieces.append(list(token_ids))

    def prompt(self, updated: Sequence[int], question: Sequence[int], **options: Any) -> tuple[list[int], dict]:
        """This turn's token ids and annotations; `options` are further annotation keys."""
        ids, spans = list(self.pieces[0]), [[0, len(self.pieces[0])]]
        ids += updated
        for piece in self.pieces[1:]:
            spans.append([len(ids), len(ids) + len(piece)])
            ids += piece
        self._start = len(ids)
        ids += self._open + list(question)
        self._asked = ids
        return ids, {"segments": [s for s in spans if s[0] < s[1]], "history": self._start, **options}

    def answered(self, token_ids: Sequence[int]) -> None:
        """Append the last question and `token_ids`, generated for it, to the history."""
        tokens = self._asked + list(token_ids)
        end = len(tokens) - 1 if len(token_ids) else self._start  # the last generated token has no KV yet
        if end > self._start:
            self.pieces.append(tokens[self._start : end])
        self._open = tokens[max(end, self._start) :]
