"""Layers that are "recorded" on the CPU by doing them again."""

from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("vllm")
from cacheslide.policies.edges import EdgeTokens
from cacheslide.policies.first_tokens import FirstTokens
from cacheslide.policies.none import NoCorrection
from cacheslide.policies.top_deviation import TopDeviation
from cacheslide.vllm.worker.attention import RowKernel
from cacheslide.vllm.worker.graph_rows import NOBODY, StaticRows
from cacheslide.vllm.worker.graphs import GraphedPrefill
from cacheslide.vllm.worker.kv_layout import OpenLayer, PackedSlots, PagedKV, scratch_kv
from cacheslide.vllm.worker.model_adapter import VllmModel
from tests.helpers.paged import Paged, kv_of

BLOCK = 8


class Skipping(OpenLayer):
    """As vLLM's kernel writes: rows at slot -1 go nowhere, which is the last block here."""

    def write(self, slots, k, v) -> None:
        nowhere = (len(self.cache) - 1) * BLOCK
        super().write(torch.where(slots < 0, nowhere, slots), k, v)


class Served(Paged):
    """The reference model over one paged cache that all requests share, as vLLM's model is; poisoned."""

    write = VllmModel.write

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.serve(RowKernel())

    def serve(self, attention) -> None:
        """Take an attention over the paged cache, and an empty cache."""
        self.attend_paged, self.slots, self.schema_positions = attention, PackedSlots(), False
        self.num_heads, self.scale = self.config.num_heads, self.config.head_dim**-0.5
        self.fresh()

    def fresh(self) -> None:
        """An empty cache of 2,000 blocks."""
        c = self.config
        memory = scratch_kv(c.num_layers, 2001 * BLOCK, c.num_kv_heads, c.head_dim, self.dtype, self.device, BLOCK)
        self.paged = [Skipping(x.cache) for x in memory.layers]
        self.free = torch.randperm(2000, generator=torch.Generator().manual_seed(1)).tolist()

    def new_kv(self, capacity):
        blocks = [self.free.pop() for _ in range(-(-capacity // BLOCK))]
        return PagedKV(self.paged, blocks, BLOCK)

    def attend(self, layer, q, groups):
        return self.attend_paged(layer, q, groups, self.scale)


class Again:
    """A recorder whose recordings do the work again; counts them, and can fail."""

    def __init__(self) -> None:
        self.recorded, self.settled, self.fails = 0, 0, False

    def record(self, step):
        if self.fails:
            raise RuntimeError("no memory for another graph")
        self.recorded += 1
        return step

    def settle(self) -> None:
        self.settled += 1

    def free(self) -> int:
        return 2**30 - 1000 * self.recorded


def graphed(model, **changes) -> tuple[GraphedPrefill, Again]:
    recorder = Again()
    graphs = GraphedPrefill(model, 400, lambda: recorder)
    vars(graphs).update(changes)
    return graphs, recorder


@contextmanager
def poisoned(monkeypatch):
    """Padding that holds NaN wherever a number may lie."""
    plain = StaticRows.fill

    def fill(self, hidden, positions, groups) -> None:
        plain(self, hidden, positions, groups)
        n = len(hidden)
        assert n < len(self.hidden) and (self.slots[n:] == -1).all() and (self.rows[n:] == NOBODY).all()
        self.hidden[n:], self.attended[:] = float("nan"), float("nan")

    with monkeypatch.context() as patch:
        patch.setattr(StaticRows, "fill", fill)
        yield


def everything(outputs, made):
    """What a run leaves: KV of every request in all layers, and its outputs."""
    kv = [x for request in made for x in kv_of(request.kv, 5, len(request.token_ids))]
    return [*kv, *(x for o in outputs for x in (o.final, o.selected, o.active))], [o.tokens_computed for o in outputs]


BATCHES = {
    "nothing_cached": [None],
    "none": [NoCorrection()],
    "first_tokens": [FirstTokens(0.3)],
    "ragged": [FirstTokens(0.3), None, EdgeTokens(2, 2)],
    "selected": [TopDeviation(0.3, 1)],
    "selected_and_known": [TopDeviation(0.3, 2), FirstTokens(0.2), None],
}
