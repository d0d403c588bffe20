"""The one builder of prefill requests: which cached rows it takes, where they go, and what a host may override."""

import pytest
import torch

from cacheslide.core.placement import Placement
from cacheslide.core.prompt import Chunk
from cacheslide.core.receipt import Receipt
from cacheslide.core.request_builder import Found, RequestBuilder, find_pieces
from cacheslide.policies.top_deviation import TopDeviation
from cacheslide.store.base import ChunkKV

CHUNKS = (("a", Chunk(0, 0, 2, 6)), ("b", Chunk(1, 1, 9, 12)), ("c", Chunk(1, 2, 12, 15)))


def chunk(model, rows: int, first: int, generation: int = 0) -> ChunkKV:
    g = torch.Generator().manual_seed(first)
    k, v = (torch.randn(model.num_layers, rows, model.num_kv_heads, model.head_dim, generator=g) for _ in range(2))
    return ChunkKV(k, v, torch.arange(first, first + rows), generation=generation)


def find(model, start: int, limit: int, lacks=(), receipt: Receipt | None = None):
    asked = []

    def fetch(number, key, at):
        asked.append((number, key))
        return None if key in lacks else chunk(model, len(at), at.start, generation=number)

    receipt = receipt or Receipt("x", 20)
    return find_pieces(CHUNKS, start, limit, fetch, receipt), asked, receipt


@pytest.mark.parametrize(
    ("start", "limit", "lacks", "pieces", "rows"),
    [
        (0, 20, (), [(0, 4), (0, 3), (0, 3)], [2, 3, 4, 5, 9, 10, 11, 12, 13, 14]),
        (4, 13, (), [(2, 2), (0, 3), (0, 1)], [0, 1, 5, 6, 7, 8]),  # both ends cut a chunk; rows count from `start`
        (6, 12, (), [(0, 3)], [3, 4, 5]),
        (0, 20, ("b",), [(0, 4), (0, 3)], [2, 3, 4, 5, 12, 13, 14]),
        (15, 20, (), [], []),
    ],
)
def test_pieces_are_the_rows_between_start_and_limit(model, start, limit, lacks, pieces, rows):
    found, asked, receipt = find(model, start, limit, lacks)
    assert [(p.first, p.length) for p in found.pieces] == pieces and found.rows.tolist() == rows
    assert found.runs.lengths == tuple(n for _, n in pieces) and found.rows.dtype == torch.int64
    assert asked == [(i, key) for i, (key, c) in enumerate(CHUNKS) if max(c.start, start) < min(c.end, limit)]
    assert receipt.chunks_hit == len(pieces)
    assert receipt.generation == max((p.chunk.generation for p in found.pieces), default=0)


def test_a_request_places_what_was_found(model):
    found, _, _ = find(model, 4, 13)
    said = []

    class Host(RequestBuilder):
        def source(self, pieces, target, placement, shift, correction):
            said.append((target.tolist(), placement, shift, correction))
            return super().source(pieces, target, placement, shift, correction)

    rule, kv = TopDeviation(0.3, 1), model.new_kv(20)
    request = Host(model).build(
        range(50, 66), range(4, 20), kv, found=found, placement=Placement("delta"), correction=rule, start=4, shift=7
    )
    assert said == [([11, 12, 16, 17, 18, 19], Placement("delta"), 7, rule)]
    assert request.token_ids.tolist() == list(range(50, 66)) and request.positions.tolist() == list(range(11, 27))
    assert (request.start, request.runs.lengths, request.reused.tolist()) == (4, (2, 3, 1), found.rows.tolist())
    assert request.kv is kv and request.correction is rule
    k, v = request.source.layer(2)
    stored = torch.cat([p.chunk.k[2, p.rows] for p in found.pieces])
    torch.testing.assert_close(k, model.rotaries[0].rotate(stored, torch.full((6,), 7)))
    assert torch.equal(v, torch.cat([p.chunk.v[2, p.rows] for p in found.pieces]))


def test_keys_that_do_not_rotate_are_never_turned(model, monkeypatch):
    found, _, _ = find(model, 0, 20)
    monkeypatch.setattr(model, "rotates", False, raising=False)
    request = RequestBuilder(model).build(
        range(20), range(20), model.new_kv(20), found=found, placement=Placement("delta"), shift=3
    )
    assert request.source.deltas is None and request.positions.tolist() == list(range(3, 23))


def test_without_anything_cached_every_row_is_computed(model):
    for found in (None, Found()):
        request = RequestBuilder(model).build([5, 6], range(8, 10), model.new_kv(10), found=found, start=8)
        assert request.source is None and len(request.reused) == 0 and request.runs.count == 0
        assert request.reused.dtype == torch.int64 and request.positions.tolist() == [8, 9] and request.start == 8
