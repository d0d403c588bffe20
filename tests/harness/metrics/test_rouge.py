"""Rouge-L against hand-worked values, and the bit-parallel LCS against the textbook table."""

import random

import pytest

from cacheslide.errors import DataError
from harness.metrics.rouge import lcs_length, rouge_l, tokens


def table_lcs(a, b):
    previous = [0] * (len(b) + 1)
    for x in a:
        row = [0]
        for j, y in enumerate(b):
            row.append(previous[j] + 1 if x == y else max(previous[j + 1], row[j]))
        previous = row
    return previous[-1]


def test_lcs_equals_the_table_on_random_lists():
    rng = random.Random(0)
    for _ in range(300):
        a = rng.choices("abcd", k=rng.randint(0, 90))
        b = rng.choices("abcde", k=rng.randint(0, 90))
        assert lcs_length(a, b) == table_lcs(a, b)


@pytest.mark.parametrize(
    ("prediction", "reference", "recall", "precision"),
    [
        ("police kill the gunman", "police killed the gunman", 3 / 4, 3 / 4),  # Lin (2004), section 3
        ("the gunman kill police", "police killed the gunman", 2 / 4, 2 / 4),
        ("Ada and Bo meet", "Ada and Bo will meet on Monday.", 4 / 7, 1.0),
        ("meet meet meet", "meet", 1.0, 1 / 3),
        ("b a", "a b", 1 / 2, 1 / 2),  # order counts
        ("It's 5-ish", "it s 5 ish", 1.0, 1.0),  # punctuation separates tokens
        ("", "a", 0.0, 0.0),
        ("a", "...", 0.0, 0.0),
        ("x", "y", 0.0, 0.0),
    ],
)
def test_rouge_l(prediction, reference, recall, precision):
    score = rouge_l(prediction, [reference])
    assert (score.recall, score.precision) == pytest.approx((recall, precision))
    f1 = 2 * recall * precision / (recall + precision) if recall + precision else 0.0
    assert score.f1 == pytest.approx(f1)


def test_the_reference_of_best_f1_counts():
    score = rouge_l("a b c", ["a", "a b c d", "z"])
    assert (score.recall, score.precision) == (3 / 4, 1.0)


def test_tokens_are_lower_case_ascii_words():
    assert tokens("Hello, WORLD-2 naïve") == ["hello", "world", "2", "na", "ve"]


@pytest.mark.parametrize("references", [[], "a text instead of a list"])
def test_references_must_be_a_list_with_an_entry(references):
    with pytest.raises(DataError):
        rouge_l("x", references)
