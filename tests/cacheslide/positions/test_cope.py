"""CoPE's plain reference against a direct reading of its definition, and CCPE's canonical offsets."""

from dataclasses import replace

import pytest
import torch

from cacheslide.errors import PromptError
from cacheslide.kernels.cope import api as kernels
from cacheslide.positions import cope
from cacheslide.positions.ccpe import SlotOffsets
from cacheslide.positions.cope import cope_attention, query_blocks
from tests.helpers.paged_rows import other_layout, paged, passes_interpreted, scattered


def made(n, keys, heads, kv_heads, dim, p_max, seed=0, dtype=torch.float32):
    """Ascending query rows with the last one among them, and random tensors; keys behind the last row hold NaN."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.cat([torch.randperm(keys - 1, generator=g)[: n - 1], torch.tensor([keys - 1])]).sort().values
    q = torch.randn(n, heads, dim, generator=g, dtype=dtype)
    k, v = torch.randn(2, keys, kv_heads, dim, generator=g, dtype=dtype)
    spare = torch.full((3, kv_heads, dim), float("nan"), dtype=dtype)
    return q, torch.cat((k, spare)), torch.cat((v, spare)), torch.randn(p_max, dim, generator=g, dtype=dtype), rows


def by_definition(q, k, v, table, rows, slots=None):
    """One query, head and key at a time, right to left, as the paper states it."""
    n, heads, dim = q.shape
    out = torch.empty_like(q)
    pairs = [] if slots is None else slots.bounds.tolist()
    for i in range(n):
        row = int(rows[i])
        for h in range(heads):
            kh = h // (heads // k.shape[1])
            position, entry, scores = 0.0, 0.0, []
            for j in range(row, -1, -1):
                score = float(q[i, h] @ k[j, kh]) * dim**-0.5
                for s, (first, end) in reversed(list(enumerate(pairs))):
                    if slots.canonical[i] and row >= end:
                        offset = float(slots.offsets[s, h])
                        if j == (end - 1 if first < end else first - 1):
                            entry = position
                        if j == first - 1:
                            position = entry + offset
                position += 1 / (1 + torch.tensor(-score, dtype=torch.float64).exp().item())
                at = position
                for s, (first, end) in enumerate(pairs):
                    if slots.cap and slots.canonical[i] and row >= end and first <= j < end:
                        at = min(at, entry + float(slots.offsets[s, h]))
                at = min(at, len(table) - 1)
                low = int(at)
                a, b = (float(q[i, h] @ table[min(m, len(table) - 1)]) for m in (low, low + 1))
                scores.append(score + a + (at - low) * (b - a))
            weights = torch.tensor(scores, dtype=q.dtype).softmax(0).flip(0)
            out[i, h] = weights @ v[: row + 1, kh]
    return out


@pytest.mark.parametrize("heads,kv_heads,dim,p_max", [(3, 3, 5, 4), (4, 2, 8, 64), (7, 1, 6, 9)])
def test_reference_is_the_definition(heads, kv_heads, dim, p_max):
    q, k, v, table, rows = made(7, 23, heads, kv_heads, dim, p_max, dtype=torch.float64)
    torch.testing.assert_close(cope_attention(q, k, v, table, rows), by_definition(q, k, v, table, rows))


@pytest.mark.parametrize("cap", [False, True])
@pytest.mark.parametrize("bounds", [[[3, 7], [11, 14]], [[0, 5], [5, 6]], [[9, 23]], [[0, 0], [4, 4], [9, 12]]])
def test_slots_are_crossed_by_their_offset(bounds, cap):
    """Slots at the start, beside each other, and around the last queries; some queries live, some inside a slot."""
    q, k, v, table, rows = made(12, 23, 4, 2, 8, 12, seed=1, dtype=torch.float64)
    g = torch.Generator().manual_seed(2)
    offsets = torch.rand(len(bounds), 4, generator=g) * 4
    canonical = torch.rand(12, generator=g) < 0.7
    slots = SlotOffsets(torch.tensor(bounds).int(), torch.tensor([0, len(bounds)]).int(), offsets, canonical, cap)
    got = cope_attention(q, k, v, table, rows, slots=slots)
    torch.testing.assert_close(got, by_definition(q, k, v, table, rows, slots), rtol=1e-6, atol=1e-6)
    live = cope_attention(q, k, v, table, rows)
    changed = (got - live).abs().amax((1, 2)) > 1e-9
    may = canonical & (rows >= min(end for _, end in bounds))
    assert not (changed & ~may).any() and (changed.any() or len(bounds) == 1)


def test_offset_equal_to_the_live_gates_changes_nothing():
    q, k, v, table, _ = made(1, 12, 2, 2, 6, 30, seed=3, dtype=torch.float64)
    rows = torch.tensor([11])
    _, gates = cope.scores_and_gates(q, k[:12], rows, None)
    offsets = gates[:, 0, 4:9].sum(-1)[None]
    slots = SlotOffsets(torch.tensor([[4, 9]]).int(), torch.tensor([0, 1]).int(), offsets, torch.tensor([True]))
    want = cope_attention(q, k, v, table, rows)
    torch.testing.assert_close(cope_attention(q, k, v, table, rows, slots=slots), want)


def test_blocks_bound_what_is_held_and_cover_every_query(monkeypatch):
    q, k, v, table, rows = made(60, 90, 4, 2, 6, 8, seed=4)
    whole = cope_attention(q, k, v, table, rows)
    monkeypatch.setattr(cope, "_PAIRS", 900)
    blocks = query_blocks(rows, 4)
    assert [i for part, _ in blocks for i in range(part.start, part.stop)] == list(range(60)) and len(blocks) > 9
    assert all((p.stop - p.start) * 4 * end <= 900 or p.stop - p.start == 1 for p, end in blocks)
    torch.testing.assert_close(cope_attention(q, k, v, table, rows), whole)


def test_gradients_go_through_gates_and_table(monkeypatch):
    monkeypatch.setattr(cope, "_PAIRS", 60)
    q, k, v, table, rows = made(5, 9, 2, 1, 3, 4, seed=5, dtype=torch.float64)
    k, v = k[:9], v[:9]
    for x in (q, k, v, table):
        x.requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: cope_attention(*a, rows), (q, k, v, table))


def test_disagreeing_slots_are_refused():
    with pytest.raises(PromptError, match="disagree"):
        SlotOffsets(torch.zeros(2, 2).int(), torch.tensor([0, 2]).int(), torch.zeros(1, 4), torch.ones(3).bool())


def test_paged_and_ragged_is_the_same_attention():
    lengths = [40, 9, 23]
    kv, table, dense = paged(lengths, 2, 6, 16, seed=6)
    rows, cu_rows = scattered(lengths, [0.5, 0.0, 1.0], seed=7)
    q, embedding = torch.randn(len(rows), 4, 6), torch.randn(8, 6)
    offsets, canonical = torch.rand(2, 4), torch.rand(len(rows)) < 0.5
    slots = SlotOffsets(torch.tensor([[3, 9], [2, 5]]).int(), torch.tensor([0, 1, 1, 2]).int(), offsets, canonical)
    out = kernels.cope_attention(q, rows, cu_rows, table, other_layout(kv), embedding, slots=slots)
    for i in (0, 2):
        begin, end = cu_rows[i : i + 2].tolist()
        part = slice(begin, end)
        want = cope_attention(q[part], *dense[i], embedding, rows[part], slots=slots.of(i, part))
        torch.testing.assert_close(out[part], want)
    last = torch.tensor([n - 1 for n in lengths]).int()
    one = kernels.cope_decode(q[:3], last, table, kv, embedding)
    for i in range(3):
        torch.testing.assert_close(one[i : i + 1], cope_attention(q[i : i + 1], *dense[i], embedding, last[i : i + 1]))


def test_what_layers_have_in_common_is_bound_once():
    """Caches, tables and offsets of one layer after the other, through one object."""
    kv, table, _ = paged([40, 23], 2, 6, 16, seed=6)
    rows, cu_rows = scattered([40, 23], [0.5, 1.0], seed=7)
    edges, cu_slots = torch.tensor([[3, 9], [2, 5]]).int(), torch.tensor([0, 1, 2]).int()
    slots = SlotOffsets(edges, cu_slots, torch.rand(2, 4), torch.rand(len(rows)) < 0.5)
    attend = kernels.CopeAttention(rows, cu_rows, table, 0.3, slots=slots)
    for layer in range(3):
        q, embedding, offsets = torch.randn(len(rows), 4, 6), torch.randn(8, 6), torch.rand(2, 4) * 5
        given = q, rows, cu_rows, table, kv + layer, embedding, 0.3
        want = kernels.cope_attention(*given, slots=replace(slots, offsets=offsets))
        assert torch.equal(attend(q, kv + layer, embedding, None, offsets), want)
        assert (want - kernels.cope_attention(*given, slots=slots)).abs().max() > 1e-3
    for wrong in (torch.rand(1, 4), torch.rand(2, 3)):
        with pytest.raises(ValueError, match="slot offsets"):
            attend(q, kv, embedding, None, wrong)


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"embedding": torch.randn(4, 8, dtype=torch.float64)}, "float64"),
        ({"embedding": torch.randn(1, 8)}, "p_max"),
        ({"embedding": torch.randn(4, 6)}, "position table"),
        ({"q": torch.randn(3, 3, 8)}, "do not fit"),
        ({"q": torch.randn(3, 8, 4).transpose(1, 2)}, "contiguous"),
        ({"scale": 0.0}, "above 0"),
    ],
)
def test_attention_refuses_what_it_cannot_do(change, reason):
    kv, table, _ = paged([3], 2, 8, 16, seed=6)
    given = {"q": torch.randn(3, 4, 8), "rows": torch.arange(3).int(), "cu_rows": torch.tensor([0, 3]).int()}
    given |= {"block_table": table, "kv": kv, "embedding": torch.randn(4, 8)} | change
    with pytest.raises(ValueError, match=reason):
        kernels.cope_attention(**given)


@pytest.mark.slow
def test_triton_kernels_under_the_interpreter():
    passes_interpreted("tests/cacheslide/kernels/cope/test_triton.py", 50)
