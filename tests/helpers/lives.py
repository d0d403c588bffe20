"""Engines one after another over one storage folder."""

from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("vllm")
from tests.helpers.served import CHUNK, Served, logprobs, tokens


@contextmanager
def life(path, folder, **options):
    """An engine over a store in `folder`, its paged cache full of garbage, until it is shut down."""
    store = {"path": str(folder), "file_gib": 0.25, "shards": 2, "direct": False, "segment_mib": 1} | options.pop(
        "store", {}
    )
    engine = Served(path, store=store, chunk_size=CHUNK, **options)
    engine.poison()
    try:
        yield engine
    finally:
        engine.core.shutdown()


def same(got, want) -> bool:
    return tokens(got) == tokens(want) and all(torch.equal(logprobs(got, i), logprobs(want, i)) for i in range(4))
