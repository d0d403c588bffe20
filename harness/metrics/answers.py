"""Exact match and token F1 as in HotPotQA's official script (hotpot_evaluate_v1.py), extended to several answers."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from cacheslide.errors import DataError

CLOSED_ANSWERS = ("yes", "no", "noanswer")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class TokenF1(NamedTuple):
    """Token overlap of a prediction and one gold answer, each in [0, 1]."""

    f1: float
    precision: float
    recall: float


def normalize_answer(text: str) -> str:
    """Lower-case, drop ASCII punctuation, drop the articles a/an/the, collapse white space; in this order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_overlap(prediction: str, answer: str) -> TokenF1:
    """Bag-of-tokens overlap after normalisation.

    precision = common / predicted tokens, recall = common / gold tokens, F1 their harmonic mean. When either side is
    "yes", "no" or "noanswer", anything but an equal answer scores zero. No common token scores zero, also for two
    answers that are both empty after normalisation, as in the official script.
    """
    predicted, gold = normalize_answer(prediction), normalize_answer(answer)
    if predicted != gold and (predicted in CLOSED_ANSWERS or gold in CLOSED_ANSWERS):
        return TokenF1(0.0, 0.0, 0.0)
    predicted_tokens, gold_tokens = predicted.split(), gold.split()
    common = (Counter(predicted_tokens) & Counter(gold_tokens)).total()
    if common == 0:
        return TokenF1(0.0, 0.0, 0.0)
    precision, recall = common / len(predicted_tokens), common / len(gold_tokens)
    return TokenF1(2 * precision * recall / (precision + recall), precision, recall)


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Token F1 in [0, 1]: the best over the accepted answers."""
    return max(token_overlap(prediction, answer).f1 for answer in _some(answers))


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when the prediction equals one of the accepted answers after normalisation, else 0.0."""
    return float(any(normalize_answer(prediction) == normalize_answer(answer) for answer in _some(answers)))


def _some(answers: Sequence[str]) -> Sequence[str]:
    if isinstance(answers, str) or not answers:
        raise DataError(f"expected one gold answer or more, got {answers!r}")
    return answers
