"""A dense retriever: cosine of sentence embeddings (Reimers and Gurevych, 2019), for models as all-MiniLM-L6-v2."""

from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cacheslide.errors import ConfigError, ModelError
from cacheslide.models.weights import fingerprint

NAME, NEEDS = "sentence_encoder", ("sentence_transformers",)
INSTALL = "pip install './bench[retrieval]'"


class EmbeddingIndex:
    """Normalised embeddings [passages, width] of one sample."""

    def __init__(self, encoder: Any, passages: Sequence[str]) -> None:
        self.encoder, self.vectors = encoder, _embed(encoder, passages)

    def scores(self, query: str) -> list[float]:
        """See `Index.scores`: cosines."""
        return (self.vectors @ _embed(self.encoder, [query])[0]).tolist()


class SentenceEncoder:
    """See `Retriever`."""

    def __init__(self, model: Path) -> None:
        library = import_module("sentence_transformers")
        try:
            self.encoder = library.SentenceTransformer(str(model), device="cpu", local_files_only=True)
        except Exception as broken:  # transformers and the library raise any exception for a damaged folder
            why = (str(broken).strip() or type(broken).__name__).splitlines()[0]
            raise ModelError(f"{model}: no sentence encoder ({why})") from None
        self.about = {"name": NAME, "library": f"sentence-transformers {version('sentence-transformers')}"}
        self.about["model"] = fingerprint(model)

    def index(self, passages: Sequence[str]) -> EmbeddingIndex:
        """See `Retriever.index`."""
        return EmbeddingIndex(self.encoder, passages)


def open_retriever(model: Path | None = None) -> SentenceEncoder:
    """The encoder in the folder `model`; ConfigError without one, ModelError if it cannot be read."""
    if model is None or not model.is_dir():
        raise ConfigError(f"retriever {NAME} needs --retriever-model, the folder of its weights")
    return SentenceEncoder(model)


def _embed(encoder: Any, texts: Sequence[str]) -> Any:
    return encoder.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
