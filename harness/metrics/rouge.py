"""Rouge-L (Lin, 2004) at the level of the whole text, on the tokens that the rouge-score package uses, unstemmed."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from cacheslide.errors import DataError

_NOT_A_TOKEN = re.compile(r"[^a-z0-9]+")


class RougeL(NamedTuple):
    """Longest common subsequence over the reference's length (recall), the prediction's (precision), and their F1."""

    recall: float
    precision: float
    f1: float


def tokens(text: str) -> list[str]:
    """Lower-case runs of ASCII letters and digits."""
    return _NOT_A_TOKEN.sub(" ", text.lower()).split()


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence of two token lists.

    Hyyrö's bit-parallel form (2004): one Python integer of `len(a)` bits holds a row of the dynamic programme, in
    which a zero bit marks a step. Time is O(len(b)) operations on integers of len(a) bits.
    """
    places: dict[str, int] = {}
    for i, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for token in b:
        matched = row & places.get(token, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(a) - row.bit_count()


def rouge_l(prediction: str, references: Sequence[str]) -> RougeL:
    """Rouge-L of a prediction, each score in [0, 1]; with several references, the one of best F1.

    An empty prediction or reference scores zero.
    """
    if isinstance(references, str) or not references:
        raise DataError(f"expected one reference or more, got {references!r}")
    return max((_single(tokens(prediction), tokens(r)) for r in references), key=lambda score: score.f1)


def _single(predicted: list[str], reference: list[str]) -> RougeL:
    common = lcs_length(reference, predicted)
    if common == 0:
        return RougeL(0.0, 0.0, 0.0)
    recall, precision = common / len(reference), common / len(predicted)
    return RougeL(recall, precision, 2 * recall * precision / (recall + precision))
