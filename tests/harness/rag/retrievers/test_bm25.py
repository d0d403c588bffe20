"""BM25's scores against its formula, and texts without words."""

import math

import pytest

from harness.rag.retrievers.base import ranking
from harness.rag.retrievers.bm25 import open_retriever

PASSAGES = ["amber falcon landed", "silver otter", "amber amber ibex painted bone"]


def lucene(tf, length, holding, count=3, k1=1.5, b=0.75):
    """One term's part of Lucene's BM25, with the mean length of `PASSAGES`."""
    mean = sum(len(p.split()) for p in PASSAGES) / count
    return math.log(1 + (count - holding + 0.5) / (holding + 0.5)) * tf / (k1 * (1 - b + b * length / mean) + tf)


def test_scores_are_the_formulas():
    index = open_retriever().index(PASSAGES)
    expected = [lucene(1, 3, 2) + lucene(1, 3, 1), 0.0, lucene(2, 5, 2)]
    assert index.scores("Falcon of AMBER?") == pytest.approx(expected, rel=1e-5)


def test_best_first_and_equal_scores_in_order():
    scores = open_retriever().index(PASSAGES).scores("otter")
    assert ranking(scores) == [1, 0, 2]


@pytest.mark.parametrize("query", ["", "the of", "unknown words"])
def test_a_query_without_known_words_scores_nothing(query):
    assert open_retriever().index(PASSAGES).scores(query) == [0.0, 0.0, 0.0]


def test_passages_without_words():
    assert open_retriever().index(["", "!"]).scores("falcon") == [0.0, 0.0]
    assert open_retriever().index(["", "falcon"]).scores("falcon")[1] > 0
