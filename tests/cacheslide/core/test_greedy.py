"""Greedy decoding in step: every sequence as if it were alone, and only what goes on is computed."""

import pytest
import torch

from cacheslide.core.greedy import greedy

VOCABULARY, STOP = 7, frozenset({0})
NEXT = {1: 2, 2: 3, 3: 0, 4: 5, 5: 4, 6: 6, 0: 0}  # what follows a token


def one_hot(token: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(token), VOCABULARY).float()


@pytest.mark.parametrize("stacked", [False, True])
def test_each_sequence_ends_by_itself(stacked):
    asked, known = [], []

    def advance(active, tokens):
        asked.append((list(active), list(tokens)))
        rows = [one_hot(NEXT[t]) for t in tokens]
        return torch.stack(rows) if stacked else rows

    first = [one_hot(t) for t in (1, 0, 4, 6, 5)]
    out = greedy(torch.stack(first) if stacked else first, [9, 9, 3, 1, 0], STOP, advance, lambda a: known.append(a))
    assert out == [[1, 2, 3], [], [4, 5, 4], [6], []]
    assert asked == [([0, 2], [1, 4]), ([0, 2], [2, 5]), ([0], [3])]  # the last token of a sequence is not appended
    assert known == [[0, 1, 2, 3], [0, 2], [0, 2], [0]]


def test_nothing_to_generate_computes_nothing():
    assert greedy([one_hot(1)], [0], STOP, lambda *_: pytest.fail("a sequence went on")) == [[]]
    assert greedy([], [], STOP, lambda *_: pytest.fail("a sequence went on")) == []
