"""A pipeline in small: made passages, a random model and a manager."""

from pathlib import Path
from typing import Any

from cacheslide.policies.registry import load_policy
from harness.rag.kv_cache_manager import KVCacheManager
from harness.rag.prompts import SamplePrompts
from harness.rag.retrieval import Retrieved, read_retrieval, retrieval_path, retrieve
from harness.rag.retrievers.registry import open_retriever
from harness.rag.samples import read_samples
from tests.helpers.made_passages import gemma, passage_row, write_musique

K = 2
SETTINGS = {"model_id": "made"}


def manager(system: str = "cacheblend", **more: Any) -> KVCacheManager:
    """A manager over the random Gemma."""
    return KVCacheManager(gemma(), load_policy(system), **more)


def prompts(number: int = 0) -> SamplePrompts:
    """The prompts of made row `number`."""
    return SamplePrompts(gemma(), passage_row(number), "f1")


def retrieved(folder: Path, count: int = 3, k: int = K) -> Retrieved:
    """A retrieval result for `count` made rows, under `folder`/results."""
    data = write_musique(folder / "made.jsonl", count)
    out = retrieval_path(folder / "results", "made", k)
    retrieve(read_samples(data), open_retriever("bm25"), k, out)
    return read_retrieval(out)
