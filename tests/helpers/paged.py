"""A model over open-layout paged caches on the CPU, as on a GPU."""

import pytest
import torch

pytest.importorskip("vllm")
from cacheslide.models.reference import ReferenceDecoder
from cacheslide.vllm.worker.attention import RowKernel
from cacheslide.vllm.worker.kv_layout import PagedKV, scratch_kv
from cacheslide.vllm.worker.prefetch import Rings, ring_bytes


class Paged(ReferenceDecoder):
    """The reference model over paged caches: what vLLM's model is to the worker on a GPU."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.kernel = RowKernel()

    def new_kv(self, capacity):
        c = self.config
        kv = scratch_kv(c.num_layers, capacity + 130, c.num_kv_heads, c.head_dim, self.dtype, self.device, 8)
        order = torch.randperm(len(kv.blocks), generator=torch.Generator().manual_seed(capacity))
        return PagedKV(kv.layers, order.tolist(), 8)  # blocks in any order

    def attend(self, layer, q, groups):
        return self.kernel(layer, q, groups, self.config.head_dim**-0.5)


def kv_of(kv, layers: int, rows: int):
    pairs = [kv.read(layer, torch.arange(rows)) for layer in range(layers)]
    return torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs])


def rings_for(pieces, layers: int, *sizes, **named) -> Rings:
    """Exactly the memory that a prefetch says it takes, full of NaN."""
    rings = Rings("cpu")
    rings.reserve(ring_bytes(pieces, layers, *sizes, **named))
    rings.memory.fill_(255)
    return rings
