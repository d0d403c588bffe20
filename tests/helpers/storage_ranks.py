"""Workers with a storage tier, and a scheduler that hears of them."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from cacheslide.store.base import ChunkKV
from cacheslide.vllm.options import ServerOptions
from cacheslide.vllm.scheduler.side import SchedulerSide
from cacheslide.vllm.worker.storage import StorageTier
from tests.helpers.scheduling import GEOMETRY
from tests.helpers.waiting import eventually

ROW = 2 * GEOMETRY.kv_heads * GEOMETRY.head_dim * GEOMETRY.itemsize
CONFIG = {"file_gib": 0.1, "shards": 2, "direct": False, "segment_mib": 1}


def planner(options: ServerOptions, ranks: int = 1) -> SchedulerSide:
    config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=16),
        kv_transfer_config=SimpleNamespace(engine_id="test"),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
    )
    return SchedulerSide(config, options, GEOMETRY)


def side(folder, ranks=1, **options) -> SchedulerSide:
    return planner(ServerOptions(chunk_size=16, store={"path": str(folder)} | CONFIG, **options), ranks)


def rank(folder, number=0, ranks=1) -> StorageTier:
    return StorageTier(ServerOptions(store={"path": str(folder)} | CONFIG).tiers, ROW, "", number, ranks)


def chunk_kv(n: int, seed: int) -> ChunkKV:
    g = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, GEOMETRY.num_layers, n, GEOMETRY.kv_heads, GEOMETRY.head_dim, generator=g)
    return ChunkKV(k, v, torch.arange(n))


def arrived(tier, count: int) -> list:
    """What `count` reads brought."""
    found = []
    assert eventually(lambda: found.extend(tier.arrivals(idle=True)) or len(found) >= count)
    return found
