"""The CoPE Triton kernels against the plain reference: at real sizes on CUDA, at tiny ones under TRITON_INTERPRET=1.

Errors are ||out - want|| / ||want|| with `want` in float64. Bounds: 2e-5 in float32; 3e-3 in float16 and 1e-2 in
bfloat16, where gates are summed in float16 (2^-12 relative a gate). Poisoned caches: reading a row that no request owns
gives NaN. bfloat16 is left to CUDA, as the interpreter emulates neither its products nor its rounding.
"""

import os
from dataclasses import replace

import pytest
import torch

from cacheslide.kernels.cope import reference as cope_reference
from cacheslide.kernels.cope import training as cope_training
from cacheslide.kernels.cope.api import CopeAttention
from cacheslide.positions.ccpe import NOWHERE, SlotOffsets
from tests.helpers.paged_rows import other_layout, paged, scattered

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs CUDA or TRITON_INTERPRET=1", allow_module_level=True)
launch = pytest.importorskip("cacheslide.kernels.cope.launch")
decode = pytest.importorskip("cacheslide.kernels.cope.decode")
whole = pytest.importorskip("cacheslide.kernels.cope.training_launch")

DEVICE = "cpu" if INTERPRETED else "cuda"
SIZE = 1 if INTERPRETED else 16  # factor on lengths
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
BOUND = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}
SATURATING, SLOW, NEVER = 0.0, -3.0, -8.0  # what a score is shifted by: gates of 0.5, 0.05 and 0.0003 on average
gpu = pytest.mark.gpu
pytestmark = [] if INTERPRETED else [gpu]


def error(out: torch.Tensor, want: torch.Tensor) -> float:
    return float((out.double() - want.double()).norm() / want.double().norm())


def inputs(lengths, heads, kv_heads, dim, block, dtype, shift=0.0, p_max=16):
    """A poisoned cache, its table, queries for as many rows as asked, a position table; `shift` moves the scores."""
    kv, table, _ = paged(lengths, kv_heads, dim, block, seed=len(lengths) + heads, dtype=dtype, device=DEVICE)
    kv[..., 0] = torch.where(kv[..., 0].isnan(), kv[..., 0], -(abs(shift) ** 0.5) * dim**0.25)
    embedding = (torch.randn(p_max, dim, generator=torch.Generator().manual_seed(dim)) * 0.3).to(DEVICE, dtype)

    def queries(n):
        q = torch.randn(n, heads, dim, generator=torch.Generator().manual_seed(n)).to(DEVICE, dtype)
        q[..., 0] = abs(shift) ** 0.5 * dim**0.25
        return q

    return kv, table, queries, embedding


def check(lengths, shares, heads, kv_heads, dim, block, dtype, shift=0.0, p_max=16, slots=None, layout=None, **options):
    """Scattered rows, both ways, into a poisoned output."""
    kv, table, queries, embedding = inputs(lengths, heads, kv_heads, dim, block, dtype, shift, p_max)
    rows, cu_rows = scattered(lengths, shares, seed=dim, device=DEVICE)
    q = queries(len(rows))
    given = None if slots is None else slots(rows, cu_rows, heads)
    out = torch.full_like(q, float("nan"))
    blocks = launch.paged(kv if layout is None else layout(kv), table)
    launch.cope_attention(q, rows, cu_rows, blocks, embedding, out=out, slots=given, **options)
    exact = (q.double(), rows, cu_rows, table, kv.double(), embedding.double())
    assert error(out, cope_reference.cope_attention(*exact, slots=given)) < BOUND[dtype]


def tiling(dtype, **changes):
    """Small tiles under the interpreter, so that tiny inputs cross their edges; else tiles of real size."""
    small = {"lanes": 16, "keys": 16, "warps": 4, "stages": 2, "far_keys": 32}
    real = {"lanes": 32, "keys": 32, "warps": 4, "stages": 2, "far_keys": 32} if dtype == torch.float32 else {}
    return launch.CopeTiling(**((small if INTERPRETED else real) | changes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads,kv_heads", [(3, 3), (6, 2), (7, 1)])
def test_every_group_size(heads, kv_heads, dtype):
    check([50 * SIZE], [0.2], heads, kv_heads, 32, 16, dtype, SLOW, tiling=tiling(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads,kv_heads", [(3, 3), (4, 2)])
@pytest.mark.parametrize("shift", [SATURATING, NEVER])
def test_every_kind_of_gates(heads, kv_heads, dtype, shift):
    check([70 * SIZE], [0.2], heads, kv_heads, 32, 16, dtype, shift, tiling=tiling(dtype))


@pytest.mark.parametrize("dim", [16, 50, 80, 128])
def test_every_head_size(dim):
    check([45 * SIZE + 1], [0.2], 4, 2, dim, 16, DTYPES[-1], SLOW, tiling=tiling(DTYPES[-1]))


@pytest.mark.parametrize("p_max", [2, 5, 50])
def test_every_length_of_the_position_table(p_max):
    for shift in (SATURATING, SLOW):
        check([60 * SIZE], [0.15], 2, 1, 16, 16, DTYPES[0], shift, p_max, tiling=tiling(DTYPES[0]))


@pytest.mark.parametrize("block", [16, 48, 64])
@pytest.mark.parametrize("layout", [None, other_layout], ids=["heads-first", "slots-first"])
def test_every_block_size_and_layout(block, layout):
    check([70 * SIZE + 5], [0.2], 4, 2, 32, block, DTYPES[1], SLOW, layout=layout, tiling=tiling(DTYPES[1]))


@pytest.mark.parametrize("pack", [True, False])
def test_ragged_requests_with_empty_ones(pack):
    lengths, shares = [33 * SIZE, 5, 64 * SIZE, 1, 9, 70], [0.2, 1.0, 0.0, 1.0, 0.0, 0.05]
    check(lengths, shares, 6, 2, 32, 16, DTYPES[1], SLOW, tiling=tiling(DTYPES[1], pack=pack))


@pytest.mark.parametrize("length", [1, 16, 17, 50])
def test_a_single_row_at_every_edge(length):
    check([length], [1 / length], 4, 2, 16, 16, torch.float32, SLOW, tiling=tiling(torch.float32))


@pytest.mark.parametrize("shift", [SATURATING, NEVER])
def test_dense_rows_and_the_kernels_own_choice_of_tiles(shift):
    check([500 if SIZE > 1 else 60, 30], [1.0, 1.0], 7, 7, 50, 16, DTYPES[1], shift, 64, max_row=60 * SIZE - 1)


def slots_of(bounds, cap):
    """Slots for every request that is long enough; Γ from 0 to 6, and two queries in three are canonical."""

    def made(rows, cu_rows, heads):
        g = torch.Generator().manual_seed(len(bounds))
        requests = len(cu_rows) - 1
        every = torch.tensor(bounds * requests).int()
        offsets = torch.rand(len(every), heads, generator=g) * 6
        canonical = torch.rand(len(rows), generator=g) < 0.67
        cu = torch.arange(requests + 1).int() * len(bounds)
        return SlotOffsets(*(x.to(DEVICE) for x in (every, cu, offsets, canonical)), cap)

    return made


@pytest.mark.parametrize("cap", [False, True])
@pytest.mark.parametrize("shift", [SATURATING, SLOW])
@pytest.mark.parametrize("bounds", [[[3, 40], [41, 60]], [[0, 16], [16, 16], [16, 20], [48, 48], [70, 95]]])
def test_slots_are_crossed_by_their_offset(bounds, shift, cap):
    bounds = [[a * SIZE, b * SIZE] for a, b in bounds]
    slots = slots_of(bounds, cap)
    check([100 * SIZE, 50 * SIZE], [0.1, 0.06], 4, 2, 16, 16, DTYPES[0], shift, 24, slots, tiling=tiling(DTYPES[0]))


@pytest.mark.parametrize("bounds", [[[3 * SIZE, 40 * SIZE]], []], ids=["one", "none"])
def test_slots_behind_every_row_are_none(bounds):
    """A batch gives all its requests as many slots as the one with most of them: the others lie nowhere."""
    slots = slots_of([*bounds, *[[NOWHERE, NOWHERE]] * 2], False)
    check([100 * SIZE, 50 * SIZE], [0.1, 0.06], 4, 2, 16, 16, DTYPES[0], SLOW, 24, slots, tiling=tiling(DTYPES[0]))


@pytest.mark.parametrize("slotted", [False, True], ids=["live", "slots"])
def test_one_launch_serves_layer_after_layer(slotted):
    """Other queries, caches, tables and offsets each time; some do not start at a multiple of 16 bytes."""
    lengths = [50, 40]
    rows, cu_rows = scattered(lengths, [0.5, 0.3], seed=9, device=DEVICE)
    kv, table, queries, embedding = inputs(lengths, 3, 1, 32, 16, torch.float32, SLOW)
    q = queries(4 * len(rows)).view(4, len(rows), 3, 32)
    slots = slots_of([[3, 20], [21, 30], [33, 38]], False)(rows, cu_rows, 3) if slotted else None
    every = None if slots is None else torch.stack([slots.offsets * (i + 1) for i in range(4)])  # 18 numbers a layer
    blocks = launch.paged(kv, table)
    cut = tiling(torch.float32)
    bound = launch.CopeLaunch(q[0], rows, cu_rows, blocks, embedding, slots=slots, tiling=cut)
    for i in range(4):
        cache, positions = kv * (i + 1), embedding * (1 - 0.2 * i)
        offsets = None if every is None else every[i]
        layer = launch.paged(cache, table)
        got = bound(q[i], layer.k, layer.v, positions, None, offsets)
        given = None if slots is None else replace(slots, offsets=offsets)
        exact = q[i].double(), rows, cu_rows, table, cache.double(), positions.double()
        assert error(got, cope_reference.cope_attention(*exact, slots=given)) < BOUND[torch.float32]


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("slotted", [False, True], ids=["live", "slots"])
def test_padding_behind_the_last_request_attends_to_nothing(slotted, pack):
    """A grid for more queries and requests than there are: what the offsets leave out is neither read nor stored."""
    lengths, shares = [50, 33], [0.5, 1.0]
    kv, table, queries, embedding = inputs(lengths, 4, 2, 32, 16, torch.float32, SLOW)
    rows, cu_rows = scattered(lengths, shares, seed=9, device=DEVICE)
    n, room, places = len(rows), len(rows) + 41, 5
    q = torch.full((room, 4, 32), float("nan"), device=DEVICE)
    q[:n] = queries(n)
    out = torch.full_like(q, 7.0)
    padded_rows = torch.full((room,), -(2**30), dtype=torch.int32, device=DEVICE)
    padded_rows[:n] = rows
    padded_cu = torch.full((places + 1,), n, dtype=torch.int32, device=DEVICE)
    padded_cu[:3] = cu_rows
    padded_table = torch.full((places, table.shape[1] + 6), -5, dtype=torch.int32, device=DEVICE)
    padded_table[:2, : table.shape[1]] = table
    real = slots_of([[3, 20], [21, 30], [NOWHERE, NOWHERE]], True)(rows, cu_rows, 4) if slotted else None
    slots = real
    if slotted:  # three slots a place; those of nobody claim anything
        bounds = torch.tensor([[0, 4]] * 3 * places, dtype=torch.int32, device=DEVICE)
        offsets = torch.full((3 * places, 4), float("nan"), device=DEVICE)
        canonical = torch.ones(room, dtype=torch.bool, device=DEVICE)
        bounds[:6], offsets[:6], canonical[:n] = real.bounds, real.offsets, real.canonical
        cu_slots = torch.arange(places + 1, dtype=torch.int32, device=DEVICE) * 3
        slots = SlotOffsets(bounds, cu_slots, offsets, canonical, True)
    cut = tiling(torch.float32, pack=pack)
    blocks = launch.paged(kv, padded_table)
    launch.cope_attention(q, padded_rows, padded_cu, blocks, embedding, out=out, slots=slots, tiling=cut)
    exact = q[:n].double(), rows, cu_rows, table, kv.double(), embedding.double()
    assert error(out[:n], cope_reference.cope_attention(*exact, slots=real)) < BOUND[torch.float32]
    assert (out[n:] == 7.0).all()


def test_strided_queries_and_output():
    """Queries as they leave a fused projection: a view into a wider tensor."""
    kv, table, queries, embedding = inputs([60], 8, 2, 32, 16, torch.float32)
    rows, cu_rows = scattered([60], [0.5], seed=9, device=DEVICE)
    qkv = queries(len(rows))
    wide = torch.full((len(rows), 6, 32), float("nan"), device=DEVICE)
    blocks = launch.paged(kv, table)
    launch.cope_attention(qkv[:, :4], rows, cu_rows, blocks, embedding, out=wide[:, 1:5], tiling=tiling(torch.float32))
    exact = (qkv[:, :4].double(), rows, cu_rows, table, kv.double(), embedding.double())
    assert error(wide[:, 1:5], cope_reference.cope_attention(*exact)) < BOUND[torch.float32]
    assert wide[:, 0].isnan().all() and wide[:, 5].isnan().all()


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float16])
@pytest.mark.parametrize("excess", [60.0, 200.0])
def test_far_keys_that_outweigh_the_near_ones_by_more_than_a_float_holds(dtype, excess):
    """Keys 16 to 31 score `excess` higher than others, for every other query head: 2^87 and 2^289 times the weight."""
    length = 200 * SIZE
    kv, table, queries, embedding = inputs([length], 4, 2, 32, 16, dtype, SATURATING, 16)
    kv[..., 1] = torch.where(kv[..., 1].isnan(), kv[..., 1], 0.0)
    kv[table[0, 1].long(), :, :, 1] = excess * 32**0.5 / 4
    rows, cu_rows = scattered([length], [0.3], seed=1, device=DEVICE)
    q = queries(len(rows))
    q[..., 1] = torch.tensor([4.0, 0.0, 4.0, 0.0], device=DEVICE)
    out = torch.full_like(q, float("nan"))
    lse = torch.full(q.shape[:2], float("nan"), device=DEVICE)
    blocks = launch.paged(kv, table)
    launch.cope_attention(q, rows, cu_rows, blocks, embedding, out=out, lse=lse)
    want = cope_reference.cope_attention(q.double(), rows, cu_rows, table, kv.double(), embedding.double())
    assert error(out, want) < 2 * BOUND[dtype]  # scores near 300 are rounded to 2e-5 in float32
    seen = rows >= 32
    assert (lse[seen][:, ::2] > excess).all() and (lse[seen][:, 1::2] < 20).all()


# One tile a chunk, several, and the kernel's own choice.
DECODE_TILINGS = [decode.DecodeTiling(16, 16, 4, 2), decode.DecodeTiling(64, 16, 4, 3), None]


@pytest.mark.parametrize("shift", [SATURATING, SLOW, NEVER])
@pytest.mark.parametrize(
    "heads,kv_heads,dim,dtype", [(4, 2, 16, DTYPES[0]), (7, 1, 50, DTYPES[1]), (3, 3, 64, DTYPES[-1])]
)
def test_decoding(heads, kv_heads, dim, dtype, shift):
    lengths = [n * SIZE for n in (50, 33)] + [1, 32]
    kv, table, queries, embedding = inputs(lengths, heads, kv_heads, dim, 16, dtype, shift, 20)
    rows = (torch.tensor(lengths) - 1).int().to(DEVICE)
    q = queries(len(rows))
    out = torch.empty_like(q)
    exact = (q.double(), rows, torch.arange(len(rows) + 1), table, kv.double(), embedding.double())
    want = cope_reference.cope_attention(*exact)
    for cut in DECODE_TILINGS:
        out.fill_(float("nan"))
        decode.cope_decode(q, rows, launch.paged(kv, table), embedding, out=out, tiling=cut)
        assert error(out, want) < BOUND[dtype], cut


@pytest.mark.skipif(INTERPRETED, reason="launches overlap on a device only")
@pytest.mark.parametrize("cut", [(1024, 32, 1, 3), (512, 128, 4, 3)])
def test_launches_that_begin_early_read_nothing_too_soon(cut):
    """Bit for bit what launches one after the other give, over many calls in a row that share their scratch memory."""
    lengths = [9000, 4100, 700, 1] * 8
    kv, table, queries, embedding = inputs(lengths, 8, 2, 128, 16, DTYPES[-1], SLOW, 64)
    rows, blocks = (torch.tensor(lengths) - 1).int().to(DEVICE), launch.paged(kv, table)
    asked = [queries(len(rows)).roll(i, 0) for i in range(40)]
    early = [decode.cope_decode(q, rows, blocks, embedding, tiling=decode.DecodeTiling(*cut)) for q in asked]
    for q, out in zip(asked, early, strict=True):
        tiling = decode.DecodeTiling(*cut, early=False)
        assert torch.equal(out, decode.cope_decode(q, rows, blocks, embedding, tiling=tiling))


def test_a_nan_key_ends_decoding_and_shows():
    """A NaN must not be taken for a place in memory; the request's output is NaN, the others' are not."""
    kv, table, queries, embedding = inputs([60, 40], 4, 2, 16, 16, torch.float32)
    kv[table[0, 2].long()] = float("nan")
    rows, q = torch.tensor([59, 39]).int().to(DEVICE), queries(2)
    out = decode.cope_decode(q, rows, launch.paged(kv, table), embedding, tiling=DECODE_TILINGS[0])
    assert out[0].isnan().any() and not out[1].isnan().any()


def sequences(batch, heads, kv_heads, length, dim, p_max, dtype, shift):
    """q, k, v [batch, heads, length, dim] inside longer tensors of NaN, a position table, and a gradient."""
    g = torch.Generator().manual_seed(length + heads)
    wide = [torch.full((batch, length + 9, n, dim), float("nan")) for n in (heads, kv_heads, kv_heads)]
    for x, sign in zip(wide, (1, -1, 0), strict=True):
        x[:, :length] = torch.randn(x[:, :length].shape, generator=g)
        if sign:
            x[:, :length, :, 0] = sign * abs(shift) ** 0.5 * dim**0.25
    embedding = torch.randn(p_max, dim, generator=g) * 0.3
    do = torch.randn(batch, heads, length, dim, generator=g)
    q, k, v = (x.to(DEVICE, dtype)[:, :length].transpose(1, 2) for x in wide)
    return q, k, v, embedding.to(DEVICE, dtype), do.to(DEVICE, dtype)


def check_gradients(got, exact, do, bound):
    """Relative errors; a gradient may be as good as 0.

    The entries' slope jumps at whole positions: where 16-bit gates round a position across one, a pair's gradient for q
    and k is another, so those two may err by a few such pairs. The table's gradient is what is left of a sum that
    largely cancels, so it may err by twice the bound there.
    """
    loose = (0.12, 0.12, bound, 2 * bound)
    for i, (mine, x) in enumerate(zip(got, exact, strict=True)):
        scale = max(float(x.grad.norm()), 1e-2 * float(do.double().norm()))
        error = float((mine.cpu().double() - x.grad).norm())
        assert error < (bound if bound < 1e-4 else loose[i]) * scale, "qkve"[i]


@pytest.mark.parametrize("shift", [SATURATING, SLOW])
@pytest.mark.parametrize(
    "batch,heads,kv_heads,length,dim,p_max,dtype",
    [(1, 4, 2, 33, 16, 8, DTYPES[0]), (2, 1, 1, 50, 50, 20, DTYPES[1]), (1, 3, 1, 40, 16, 5, DTYPES[-1])],
)
def test_gradients(batch, heads, kv_heads, length, dim, p_max, dtype, shift):
    length = length * 10 if SIZE > 1 else min(length, 21)
    q, k, v, embedding, do = sequences(batch, heads, kv_heads, length, dim, p_max, dtype, shift)
    cut = launch.CopeTiling(16, 16, 4, 2, pack=False, far_keys=32) if INTERPRETED else None
    block = 16 if INTERPRETED else None
    out, lse = whole.forward(q, k, v, embedding, dim**-0.5, cut)
    got = whole.backward(q, k, v, embedding, out, lse, do, dim**-0.5, block, block)
    exact = [x.cpu().double().requires_grad_() for x in (q, k, v, embedding)]
    want = cope_training.cope_attention(*exact)
    want.backward(do.cpu().double())
    assert error(out.cpu(), want.detach()) < BOUND[dtype]
    check_gradients(got, exact, do, 4 * BOUND[dtype])


@gpu
@pytest.mark.skipif(INTERPRETED, reason="needs CUDA")
@pytest.mark.parametrize("shift", [SATURATING, SLOW, NEVER])
@pytest.mark.parametrize("heads,kv_heads", [(32, 8), (28, 4)])
def test_a_long_packed_batch(heads, kv_heads, shift):
    check([8192, 500, 4097, 3], [0.26, 0.9, 0.05, 0.0], heads, kv_heads, 128, 16, torch.bfloat16, shift, 64)


@gpu
@pytest.mark.skipif(INTERPRETED, reason="needs CUDA")
@pytest.mark.parametrize("lanes,keys,warps,stages,far", [(128, 64, 8, 3, 128), (64, 64, 4, 2, 64), (64, 32, 4, 2, 64)])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 129, 3000])
def test_tiles_of_real_size_at_every_edge(length, lanes, keys, warps, stages, far):
    cut = launch.CopeTiling(lanes=lanes, keys=keys, warps=warps, stages=stages, far_keys=far)
    for share in (1 / length, 1.0):
        check([length, 40], [share, 0.5], 6, 2, 128, 16, torch.float16, SLOW, 64, tiling=cut)


@gpu
@pytest.mark.skipif(INTERPRETED, reason="needs CUDA")
def test_decoding_can_be_captured():
    kv, table, queries, embedding = inputs([3000, 700], 32, 8, 128, 16, torch.bfloat16, SLOW, 64)
    rows, q = torch.tensor([2999, 699]).int().to(DEVICE), queries(2)
    blocks = launch.paged(kv, table)
    want = decode.cope_decode(q, rows, blocks, embedding)
    graph, out = torch.cuda.CUDAGraph(), torch.empty_like(q)
    with torch.cuda.graph(graph):
        decode.cope_decode(q, rows, blocks, embedding, out=out)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(out, want)


@gpu
@pytest.mark.skipif(INTERPRETED, reason="needs CUDA")
def test_slot_offsets_at_any_address_are_one_compilation():
    """A layer's are a slice of all layers'."""
    compiled = launch._cope_attention.device_caches
    kv, table, queries, embedding = inputs([200], 6, 2, 64, 16, torch.bfloat16, SLOW, 20)
    rows, cu_rows = scattered([200], [0.3], seed=9, device=DEVICE)
    slots = slots_of([[3, 40], [41, 60], [70, 90]], False)(rows, cu_rows, 6)
    every = torch.stack([slots.offsets] * 4)  # 18 numbers a layer
    q, before, got = queries(len(rows)), None, []
    for offsets in every:  # bound anew each time: Triton looks at every address
        got.append(CopeAttention(rows, cu_rows, table, slots=replace(slots, offsets=offsets))(q, kv, embedding))
        count = sum(len(cache[0]) for cache in compiled.values())
        assert before in (None, count)
        before = count
        assert torch.equal(got[-1], got[0])


@gpu
@pytest.mark.skipif(INTERPRETED, reason="needs CUDA")
@pytest.mark.parametrize("slotted", [False, True], ids=["live", "slots"])
def test_attention_can_be_captured(slotted):
    """In fixed memory: another batch's rows and slots in it give that batch's attention."""
    lengths = [3000, 700]
    kv, table, queries, embedding = inputs(lengths, 32, 8, 128, 16, torch.bfloat16, SLOW, 64)
    rows, cu_rows = (x.clone() for x in scattered(lengths, [0.1, 0.1], seed=1, device=DEVICE))
    slots = slots_of([[30, 400], [410, 600]], False)(rows, cu_rows, 32) if slotted else None
    q = queries(len(rows))
    graph, out = torch.cuda.CUDAGraph(), torch.empty_like(q)
    attend = CopeAttention(rows, cu_rows, table, slots=slots)
    attend(q, kv, embedding, out)
    with torch.cuda.graph(graph):
        attend(q, kv, embedding, out)
    for seed in (1, 2, 3):
        other, ends = scattered(lengths, [0.1, 0.1], seed=seed, device=DEVICE)
        rows.copy_(other)
        cu_rows.copy_(ends)
        if slotted:
            slots.bounds.copy_(slots.bounds - slots.bounds % 8 + seed)
        want = CopeAttention(rows, cu_rows, table, slots=slots)(q, kv, embedding)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, want) and want.isfinite().all()


@gpu
@pytest.mark.skipif(INTERPRETED, reason="needs CUDA")
@pytest.mark.parametrize("shift", [SATURATING, SLOW, NEVER])
@pytest.mark.parametrize("heads,kv_heads,dim", [(6, 6, 64), (8, 2, 128)])
def test_gradients_through_autograd(heads, kv_heads, dim, shift):
    q, k, v, embedding, do = sequences(3, heads, kv_heads, 777, dim, 64, torch.bfloat16, shift)
    mine = [x.detach().requires_grad_() for x in (q, k, v, embedding)]
    cope_training.cope_attention(*mine).backward(do)
    exact = [x.cpu().double().requires_grad_() for x in (q, k, v, embedding)]
    cope_training.cope_attention(*exact).backward(do.cpu().double())
    check_gradients([x.grad for x in mine], exact, do, 4e-2)
