"""BM25 (Robertson and Zaragoza, 2009) by the library bm25s, in Lucene's form, without English stop words."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bm25s

from cacheslide.errors import ConfigError

NAME, NEEDS, INSTALL = "bm25", ("bm25s",), ""
SETTINGS: dict[str, Any] = {"method": "lucene", "k1": 1.5, "b": 0.75}
STOPWORDS = "english"


class Bm25Index:
    """BM25 over the passages of one sample."""

    def __init__(self, passages: Sequence[str]) -> None:
        words = _words(list(passages))
        self.count, self.scorer = len(passages), None
        if any(words):  # the library divides by the mean length
            self.scorer = bm25s.BM25(**SETTINGS)
            self.scorer.index(words, show_progress=False)

    def scores(self, query: str) -> list[float]:
        """See `Index.scores`; 0 for passages without a word of the query."""
        [words] = _words([query])
        if self.scorer is None or not words:
            return [0.0] * self.count
        return self.scorer.get_scores(words).tolist()


class Bm25:
    """See `Retriever`."""

    def __init__(self) -> None:
        self.about = {"name": NAME, "library": f"bm25s {version('bm25s')}", "stopwords": STOPWORDS, **SETTINGS}

    def index(self, passages: Sequence[str]) -> Bm25Index:
        """See `Retriever.index`."""
        return Bm25Index(passages)


def open_retriever(model: Path | None = None) -> Bm25:
    """BM25 has no weights: ConfigError if a model is given."""
    if model is not None:
        raise ConfigError(f"retriever {NAME} has no model: leave out {model}")
    return Bm25()


def _words(texts: list[str]) -> list[list[str]]:
    return bm25s.tokenize(texts, stopwords=STOPWORDS, return_ids=False, show_progress=False)
