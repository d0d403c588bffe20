"""The GPU's way of placing cached rows, run on the CPU: open-layout caches, fused placement, layer-wise prefetch."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm")

from cacheslide.core.engine import ReuseEngine
from cacheslide.core.placement import Piece, PlacedChunks, Placement
from cacheslide.core.selective_prefill import SelectivePrefill
from cacheslide.policies.edges import EdgeTokens
from cacheslide.policies.none import NoCorrection
from cacheslide.policies.top_deviation import Promotion, Swap, TopDeviation
from cacheslide.positions.rope import Rotary, inverse_frequencies
from cacheslide.store import MemoryChunkStore
from cacheslide.store.base import ChunkKV
from cacheslide.vllm.worker.kv_layout import scratch_kv
from cacheslide.vllm.worker.paged_source import Caches, PagedChunks
from cacheslide.vllm.worker.prefetch import LayerFetch, ring_bytes
from tests.helpers.paged import Paged, kv_of, rings_for
from tests.helpers.prompts import chain, prompt

pytestmark = pytest.mark.slow

RULES = {
    "none": NoCorrection(),
    "edges": EdgeTokens(3, 2),
    "first_layer": TopDeviation(0.26, 0),
    "top": TopDeviation(0.26, 2),
    "zero": TopDeviation(0.0, 1),
    "all": TopDeviation(1.0, 1),
    "keys_and_values": TopDeviation(0.4, 1, metric="kv"),
    "fused": TopDeviation(0.3, 1, fusion="paper"),
    "swap": TopDeviation(0.2, 1, swap=Swap(tau=2.0, every=2)),  # everything converged: all rows change places
    "swap_some": TopDeviation(0.4, 1, swap=Swap(tau=0.02, every=1)),
    "promote": TopDeviation(0.1, 1, promote=(Promotion(1, 0.2), Promotion(2, 0.1))),
}


@pytest.fixture(scope="module")
def paged(checkpoint) -> Paged:
    return Paged.from_pretrained(checkpoint)


@pytest.mark.parametrize("fetched", [False, True], ids=["on_device", "from_host"])
@pytest.mark.parametrize("rotation", ["delta", "stored"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rows_placed_in_the_cache_equal_rows_written_one_layer_at_a_time(model, paged, rule, rotation, fetched):
    policy, now = chain(rule, rotation=rotation), prompt(13, 5)
    engines = [ReuseEngine(m, policy, MemoryChunkStore(), chunk_size=16) for m in (model, paged)]
    for engine in engines:
        engine.build(prompt(7, 3))
    want = engines[0].prefill(now)
    request, _, _ = engines[1]._prepare(now, 0, 0)
    plain, n = request.source, paged.num_layers
    pieces = [Piece(p.chunk, p.length) for p in plain.pieces]
    first = rule.layer if isinstance(rule, TopDeviation) else 0
    fetch = LayerFetch(pieces, first, n, rings_for(pieces, n - first, group=2), group=2) if fetched else None
    target = request.positions[request.reused]
    settings = (pieces, target, policy.placement, paged.rotaries, torch.float32, 0, torch.device("cpu"))
    request.source = PagedChunks(*settings, Caches(request.kv.layers), fetch)
    [output] = SelectivePrefill(paged).run([request])
    assert torch.equal(output.selected, want.output.selected)
    assert output.tokens_computed == want.output.tokens_computed
    for got, expected in zip(kv_of(request.kv, n, len(now)), (want.kv.k, want.kv.v), strict=True):
        torch.testing.assert_close(got, expected[:, : len(now)], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.hidden, want.output.hidden, atol=1e-5, rtol=1e-5)


def test_rows_placed_at_once_turn_by_the_rotation_of_their_layer(model):
    """Runs of layers that share one are placed in one launch each."""
    rotaries = [Rotary(inverse_frequencies(10, theta), 64) for theta in (1e4, 5e5)]
    rotaries = [rotaries[i] for i in (0, 0, 1, 0, 1)]
    k, v = torch.randn(2, 5, 8, 2, 10, generator=torch.Generator().manual_seed(2))
    pieces, target = [Piece(ChunkKV(k, v, torch.arange(4, 12)), 8)], torch.arange(33, 41)
    settings = pieces, target, Placement("delta"), rotaries, torch.float32, 0, torch.device("cpu")
    kv, rows = scratch_kv(5, 8, 2, 10, torch.float32, "cpu", 8), torch.arange(8)
    source = PagedChunks(*settings, Caches(kv.layers))
    source.place(0, rows, kv, rows)
    for layer, rotary in enumerate(rotaries):
        want = rotary.move(k[layer], torch.arange(4, 12), target)
        torch.testing.assert_close(kv.read(layer, rows)[0], want)
        apart = source.deviation(layer, rows, want + 1, v[layer], "k")
        torch.testing.assert_close(apart, torch.full((8,), 20.0))  # 1 in each of 2 x 10 numbers


def test_a_shifted_prompt_turns_keys_by_the_shift_as_well(model):
    k, v = torch.randn(5, 8, 2, 10), torch.randn(5, 8, 2, 10)
    chunk = ChunkKV(k, v, torch.arange(4, 12))
    for rotation, turn in (("delta", 29), ("stored", 9)):
        placement = replace(chain(NoCorrection()).placement, rotation=rotation)
        moved, values = PlacedChunks(
            [Piece(chunk, 8)], torch.arange(33, 41), placement, model.rotaries, torch.float32, shift=9
        ).layer(3)
        torch.testing.assert_close(moved, model.rotaries[3].rotate(k[3], torch.full((8,), turn)), atol=1e-6, rtol=1e-6)
        assert torch.equal(values, v[3])


def chunk_of(layers: int, rows: int, seed: int) -> ChunkKV:
    g = torch.Generator().manual_seed(seed)
    return ChunkKV(*(torch.randn(layers, rows, 2, 4, generator=g) for _ in range(2)), torch.arange(rows))


def from_pages(chunk: ChunkKV) -> ChunkKV:
    """The chunk as it comes from a file: keys and values of a token side by side."""
    k, v = torch.stack((chunk.k, chunk.v), 2).unbind(2)
    return replace(chunk, k=k, v=v)


@pytest.mark.parametrize(("group", "depth"), [(1, 1), (2, 2), (3, 1), (9, 9)])
def test_prefetched_layers_hold_their_rows_until_the_next_group(group, depth):
    chunks = from_pages(chunk_of(6, 3, 2)), chunk_of(6, 5, 0), from_pages(chunk_of(6, 7, 1))
    pieces = [Piece(chunks[0], 3), Piece(chunks[1], 5), Piece(chunks[2], 4, first=2)]
    assert ring_bytes(pieces, 5, group, depth) >= sum(2 * min(group, 5) * c.k[0].nbytes for c in chunks)
    fetch = LayerFetch(pieces, 1, 6, rings_for(pieces, 5, group, depth), group=group, depth=depth)
    for layer in range(1, 6):
        for _ in range(2):  # scores are taken from a layer before it is placed
            end, parts = fetch.group(layer)
            assert layer < end <= 6 and (end == 6 or (end - 1) % group == 0)
            for (k, v), piece in zip(parts, pieces, strict=True):
                assert torch.equal(k, piece.chunk.k[layer:end, piece.rows])
                assert torch.equal(v, piece.chunk.v[layer:end, piece.rows])
    if group < 5:
        with pytest.raises(LookupError, match="layer 1 is not under way"):
            fetch.group(1)
