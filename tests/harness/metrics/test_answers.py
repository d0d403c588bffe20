"""Exact match and token F1 against values worked out by hand from HotPotQA's official script."""

import pytest

from cacheslide.errors import DataError
from harness.metrics.answers import exact_match, normalize_answer, token_f1, token_overlap


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Quick, brown\tFox!", "quick brown fox"),
        ("A an THE", ""),
        ("U.S.A.", "usa"),  # punctuation is removed, not replaced by a space
        ("well-known", "wellknown"),
        ("Anthem of the Sea", "anthem of sea"),  # articles are whole words
        ("a.n.", ""),  # punctuation goes first, then articles,
        ("t.h.e cat", "cat"),  # so that "t.h.e" becomes one
        ("“quoted” – dash", "“quoted” – dash"),  # only ASCII punctuation counts
        ("Åse Ø", "åse ø"),
        ("", ""),
    ],
)
def test_normalisation(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answer", "f1", "precision", "recall"),
    [
        ("Jon Aske", "jon aske.", 1.0, 1.0, 1.0),
        ("the Grell Bridge in Pell", "Grell Bridge", 2 / 3, 1 / 2, 1.0),  # tokens: grell bridge in pell
        ("Bridge", "Grell Bridge", 2 / 3, 1.0, 1 / 2),
        ("red red blue", "red blue blue", 2 / 3, 2 / 3, 2 / 3),  # counted with multiplicity
        ("Pell", "Grell", 0.0, 0.0, 0.0),
        ("", "Grell", 0.0, 0.0, 0.0),
        ("the", "a", 0.0, 0.0, 0.0),  # nothing is left on either side: the script gives 0
        ("yes", "Yes.", 1.0, 1.0, 1.0),
        ("yes", "yes indeed", 0.0, 0.0, 0.0),  # a closed answer matches whole or not at all
        ("yes indeed", "yes", 0.0, 0.0, 0.0),
        ("no", "no man", 0.0, 0.0, 0.0),
        ("noanswer", "noanswer", 1.0, 1.0, 1.0),
        ("noanswer found", "noanswer", 0.0, 0.0, 0.0),
        ("yes man", "yes men", 1 / 2, 1 / 2, 1 / 2),  # "yes" inside a longer text is a token like any other
    ],
)
def test_token_overlap(prediction, answer, f1, precision, recall):
    assert token_overlap(prediction, answer) == pytest.approx((f1, precision, recall))


def test_exact_match_needs_the_whole_answer():
    assert exact_match("The Grell Bridge!", ["grell bridge"]) == 1.0
    assert exact_match("Grell Bridge in Pell", ["grell bridge"]) == 0.0
    assert exact_match("the", ["a"]) == 1.0  # both are empty after normalisation; the script counts them equal


def test_the_best_alias_counts():
    assert token_f1("J. Aske", ["Jon Aske", "J Aske"]) == 1.0
    assert token_f1("Jon B Aske", ["Jonathan Aske", "Jon Aske"]) == pytest.approx(0.8)
    assert exact_match("j aske", ["Jon Aske", "J. Aske"]) == 1.0
    assert token_f1("yes", ["no", "yes"]) == 1.0


@pytest.mark.parametrize("answers", [[], "a text instead of a list"])
def test_answers_must_be_a_list_with_an_entry(answers):
    for metric in (token_f1, exact_match):
        with pytest.raises(DataError):
            metric("x", answers)
