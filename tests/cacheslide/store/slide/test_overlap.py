"""The load-write orders: the same result whatever finishes first, no row served before it is there."""

import random
import time

import pytest
import torch

from cacheslide.errors import ConfigError
from cacheslide.store.slide.overlap import ORDERS, LoadWrite, PagedKV
from tests.helpers.chunks import chunk, encoded, name, tier
from tests.helpers.waiting import eventually

LAYERS, ROWS, HEADS, DIM = 5, 37, 2, 6


class Source:
    """Cached rows that arrive after random pauses."""

    def __init__(self, cached, seed, slow):
        self.cached, self.rng, self.slow = cached, random.Random(seed), slow

    def read(self, layer, out):
        time.sleep(self.rng.random() * self.slow)
        return out.copy_(self.cached[layer])


class Work:
    """A model in small: each layer's fresh rows depend on the layer before, attention reads every row."""

    def __init__(self, selected, weights, seed, slow):
        self.selected, self.weights, self.rng, self.slow = selected, weights, random.Random(seed), slow
        self.state, self.outputs = torch.ones(HEADS, DIM, dtype=torch.float64), []

    def recompute(self, layer):
        time.sleep(self.rng.random() * self.slow)
        return torch.sin(self.weights[layer] + self.state)

    def fuse(self, layer, fresh, cached):
        return 0.75 * fresh + 0.25 * cached

    def attend(self, layer, kv, slots):
        rows = kv[slots]
        self.state = (rows[:, 0] * torch.tanh(rows[:, 1])).sum(0) / len(rows)
        self.outputs.append(rows.clone())


def case(seed):
    g = torch.Generator().manual_seed(seed)
    cached = torch.randn(LAYERS, ROWS, 2, HEADS, DIM, generator=g, dtype=torch.float64)
    selected = torch.randperm(ROWS, generator=g)[:11].sort().values
    weights = torch.randn(LAYERS, len(selected), 2, HEADS, DIM, generator=g, dtype=torch.float64)
    order = torch.randperm(80, generator=g)
    kv = torch.full((LAYERS, 80, 2, HEADS, DIM), float("nan"), dtype=torch.float64)
    return cached, selected, weights, PagedKV(kv, order[:ROWS].repeat(LAYERS, 1), order[ROWS : ROWS + 11])


def expected(cached, selected, weights):
    work = Work(selected, weights, 0, 0)
    for layer in range(LAYERS):
        rows = cached[layer].clone()
        rows[selected] = work.fuse(layer, work.recompute(layer), rows[selected])
        work.attend(layer, rows, torch.arange(ROWS))
    return work.outputs


@pytest.mark.parametrize("slow_load", [0.0, 0.01])
@pytest.mark.parametrize("slow_work", [0.0, 0.01])
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_gives_the_same_rows(order, slow_load, slow_work):
    for seed in range(3):
        cached, selected, weights, target = case(seed)
        want = expected(cached, selected, weights)
        work = Work(selected, weights, seed, slow_work)
        plan = LoadWrite(order, staging=1 + seed, workers=2)
        report = plan.run(Source(cached, seed, slow_load), target, selected, work)
        assert all(torch.equal(a, b) for a, b in zip(work.outputs, want, strict=True))
        assert len(report.layer_s) == LAYERS and (order == "relocate" or not report.relocated)


def test_relocation_repoints_the_rows_it_recomputed():
    cached, selected, weights, target = case(1)
    home, original = target.slots.clone(), torch.Tensor.index_copy_

    layers = iter(range(LAYERS))

    def late_copy(self, *args):  # the bulk is held back until its layer's selected rows have been moved
        layer = next(layers)
        assert eventually(lambda: torch.equal(target.slots[layer][selected], target.spare)), "nothing was relocated"
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "index_copy_", late_copy)
        work = Work(selected, weights, 0, 0)
        report = LoadWrite("relocate", staging=1, workers=1).run(Source(cached, 0, 0), target, selected, work)
    assert all(torch.equal(a, b) for a, b in zip(work.outputs, expected(cached, selected, weights), strict=True))
    assert report.relocated == LAYERS * len(selected)
    for layer in range(LAYERS):
        assert torch.equal(target.slots[layer][selected], target.spare)
        rest = torch.ones(ROWS, dtype=torch.bool)
        rest[selected] = False
        assert torch.equal(target.slots[layer][rest], home[layer][rest])


@pytest.mark.parametrize("order", ORDERS)
def test_a_failing_load_is_raised_not_hung(order):
    cached, selected, weights, target = case(0)

    class Broken(Source):
        def read(self, layer, out):
            if layer == 2:
                raise OSError(5, "Input/output error")
            return super().read(layer, out)

    with pytest.raises(OSError, match="Input/output"):
        LoadWrite(order).run(Broken(cached, 0, 0), target, selected, Work(selected, weights, 0, 0))


def test_layers_come_from_the_file_tier(tmp_path):
    from cacheslide.store.slide.layers import FileLayers, HostLayers

    store = tier(tmp_path / "s")
    store.write([encoded(i) for i in (1, 2)])
    source = FileLayers(store, [name(1), name(2)], [40, 25])
    for layer in range(3):
        out = torch.full((65, 2, 2, 8), float("nan"))
        assert source.read(layer, out) is out
        for i, (at, n) in {1: (0, 40), 2: (40, 25)}.items():
            assert torch.equal(out[at : at + n, 0], chunk(i).k[layer, :n])
            assert torch.equal(out[at : at + n, 1], chunk(i).v[layer, :n])
        assert torch.equal(HostLayers.of([chunk(1), chunk(2)]).read(layer, out)[:65], out)
    with pytest.raises(OSError, match="not in the file tier"):
        FileLayers(store, [name(7)], [40]).read(0, torch.empty(40, 2, 2, 8))


def test_unknown_orders_are_refused():
    with pytest.raises(ConfigError, match="locked, relocate, disjoint"):
        LoadWrite("racy")
