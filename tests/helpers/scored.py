"""Chunks that remember the deviation of their tokens."""

from dataclasses import replace

import torch

from cacheslide.store import ChunkKV
from tests.helpers.chunks import chunk


def scored(i: int, **kw) -> ChunkKV:
    plain = chunk(i, **kw)
    return replace(plain, scores=torch.rand(len(plain.positions), generator=torch.Generator().manual_seed(i)) * 9)
