"""What the pipeline asks of a retriever. A retriever is one file in this folder, with the names listed here.

NAME : str
    Its name on the command line.
NEEDS : tuple of str
    Modules that must be installed, besides the benchmark's own dependencies.
INSTALL : str
    The command that installs them; "" where the benchmark depends on them.
open_retriever(model) -> Retriever
    `model` is the folder of a model's weights, or None. Raises ConfigError where a retriever needs one and has none.
"""

from collections.abc import Sequence
from typing import Any, Protocol


class Index(Protocol):
    """The passages of one sample, ready to be searched."""

    def scores(self, query: str) -> list[float]:
        """Relevance of every passage to `query`, in the passages' order; more is better."""
        ...


class Retriever(Protocol):
    """Makes indices.

    Attributes
    ----------
    about : dict
        Library, version and settings, for records; JSON-serialisable.
    """

    about: dict[str, Any]

    def index(self, passages: Sequence[str]) -> Index:
        """An index of `passages`."""
        ...


def ranking(scores: Sequence[float]) -> list[int]:
    """Indices of the passages, best first; passages of equal score keep their order."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])
