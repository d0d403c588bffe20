"""The Triton kernels against the plain ones: at real sizes on CUDA, at tiny ones under TRITON_INTERPRET=1.

Errors are ||out - want|| / ||want|| with `want` computed in float64 from the same inputs. Bounds: 1e-5 in float32
(sums of a few thousand terms), 2e-3 in float16, 1e-2 in bfloat16 (the output alone rounds by up to 2^-9, the softmax
weights once more). On the interpreter bfloat16 is left out: it emulates neither its products nor its rounding.
"""

import os

import pytest
import torch

from cacheslide.kernels.bound import BoundKernel
from cacheslide.kernels.placement import reference as placement_reference
from cacheslide.kernels.row_attention import reference
from cacheslide.positions.rope import Rotary, inverse_frequencies
from tests.helpers.paged_rows import other_layout, paged, scattered

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs CUDA or TRITON_INTERPRET=1", allow_module_level=True)
launch = pytest.importorskip("cacheslide.kernels.row_attention.launch")
placement = pytest.importorskip("cacheslide.kernels.placement.triton")

DEVICE = "cpu" if INTERPRETED else "cuda"
SIZE = 1 if INTERPRETED else 16  # factor on lengths
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
gpu = pytest.mark.gpu
pytestmark = [] if INTERPRETED else [gpu]


def error(out: torch.Tensor, want: torch.Tensor) -> float:
    return float((out.double() - want.double()).norm() / want.double().norm())


def check_attention(lengths, shares, heads, kv_heads, dim, block, dtype, layout=lambda kv: kv, **options):
    """Run both on fresh inputs, a poisoned cache and a poisoned output."""
    kv, table, _ = paged(lengths, kv_heads, dim, block, seed=len(lengths) + heads, dtype=dtype, device=DEVICE)
    rows, cu_rows = scattered(lengths, shares, seed=dim, device=DEVICE)
    q = torch.randn(len(rows), heads, dim).to(DEVICE, dtype)
    out = torch.full_like(q, float("nan"))
    launch.row_attention(q, rows, cu_rows, table, layout(kv), out=out, **options)
    want = reference.row_attention(q.double(), rows, cu_rows, table, kv.double())
    assert error(out, want) < BOUND[dtype]


def tiling(dtype, **changes):
    """Small tiles under the interpreter, so that tiny inputs cross their edges; else the kernel's own choice."""
    small = {"lanes": 16, "keys": 32, "warps": 4, "stages": 2}
    real = {"lanes": 32, "keys": 32, "warps": 4, "stages": 2} if dtype == torch.float32 else {}
    return launch.Tiling(**((small if INTERPRETED else real) | changes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads,kv_heads", [(3, 3), (4, 2), (6, 2), (4, 1), (7, 1), (8, 1)])
def test_every_group_size(heads, kv_heads, dtype):
    check_attention([70 * SIZE], [0.4], heads, kv_heads, 64, 16, dtype, tiling=tiling(dtype))


@pytest.mark.parametrize("dim", [16, 50, 64, 80, 96, 128])
def test_every_head_size(dim):
    check_attention([45 * SIZE + 1], [0.6], 4, 2, dim, 16, DTYPES[-1], tiling=tiling(DTYPES[-1]))


@pytest.mark.parametrize("block", [16, 32, 48, 64, 128])
@pytest.mark.parametrize("layout", [lambda kv: kv, other_layout], ids=["heads-first", "slots-first"])
def test_every_block_size_and_layout(block, layout):
    check_attention([90 * SIZE + 5], [0.5], 4, 2, 32, block, DTYPES[1], layout, tiling=tiling(DTYPES[1]))


@pytest.mark.parametrize("chunk", [0, 64])
@pytest.mark.parametrize("pack", [True, False])
def test_ragged_requests_with_empty_ones(pack, chunk):
    lengths = [33 * SIZE, 5, 64 * SIZE, 1, 9, 100]
    shares = [0.3, 1.0, 0.0, 1.0, 0.0, 0.1]
    check_attention(lengths, shares, 6, 2, 32, 16, DTYPES[1], tiling=tiling(DTYPES[1], pack=pack, chunk=chunk))


@pytest.mark.parametrize("chunk", [0, 32])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 97])
def test_a_single_row_at_every_edge(length, chunk):
    cut = tiling(torch.float32, chunk=chunk)
    check_attention([length], [1 / length], 4, 2, 16, 16, torch.float32, tiling=cut)


def test_dense_rows_and_the_kernels_own_choice_of_tiles():
    check_attention([40 * SIZE, 30], [1.0, 1.0], 4, 2, 32, 16, DTYPES[1], max_row=40 * SIZE - 1)


def test_strided_queries_and_output():
    """Queries as they leave a fused QKV projection: a view into a wider tensor."""
    kv, table, _ = paged([60], 2, 32, 16, seed=8, device=DEVICE)
    rows, cu_rows = scattered([60], [0.5], seed=9, device=DEVICE)
    qkv = torch.randn(len(rows), 8, 32).to(DEVICE)
    wide = torch.full((len(rows), 6, 32), float("nan"), device=DEVICE)
    launch.row_attention(qkv[:, :4], rows, cu_rows, table, kv, out=wide[:, 1:5], tiling=tiling(torch.float32))
    want = reference.row_attention(qkv[:, :4].double(), rows, cu_rows, table, kv.double())
    assert error(wide[:, 1:5], want) < BOUND[torch.float32]
    assert wide[:, 0].isnan().all() and wide[:, 5].isnan().all()


@pytest.mark.parametrize("chunk", [0, 32])
def test_one_launch_serves_layer_after_layer(chunk):
    """Other queries, caches and outputs each time; some do not start at a multiple of 16 bytes."""
    lengths = [50, 20]
    rows, cu_rows = scattered(lengths, [0.5, 0.3], seed=9, device=DEVICE)
    first, table, _ = paged(lengths, 2, 32, 16, seed=4, device=DEVICE)
    caches = [first * (i + 1) for i in range(4)]
    memory = torch.randn(4, len(rows) * 4 * 32 + 3).to(DEVICE)
    queries = [memory[i, i % 2 : i % 2 + len(rows) * 4 * 32].view(len(rows), 4, 32) for i in range(4)]
    bound = launch.RowLaunch(queries[0], rows, cu_rows, table, first, tiling=tiling(torch.float32, chunk=chunk))
    for q, kv in zip(queries, caches, strict=True):
        want = reference.row_attention(q.double(), rows, cu_rows, table, kv.double())
        assert error(bound(q, kv), want) < BOUND[torch.float32]


@pytest.mark.parametrize("chunk", [0, 32])
def test_padding_behind_the_last_request_attends_to_nothing(chunk):
    """A grid for more queries and requests than there are: what the offsets leave out is not read, and stored as 0.

    Without chunks of keys it is not stored at all.
    """
    lengths, shares = [50, 33], [0.5, 1.0]
    kv, table, _ = paged(lengths, 2, 32, 16, seed=4, device=DEVICE)
    rows, cu_rows = scattered(lengths, shares, seed=9, device=DEVICE)
    n, room, places = len(rows), len(rows) + 41, 5
    q = torch.full((room, 4, 32), float("nan"), device=DEVICE)
    q[:n] = torch.randn(n, 4, 32).to(DEVICE)
    out = torch.full_like(q, float("nan") if chunk else 7.0)
    padded_rows = torch.full((room,), -(2**30), dtype=torch.int32, device=DEVICE)
    padded_rows[:n] = rows
    padded_cu = torch.full((places + 1,), n, dtype=torch.int32, device=DEVICE)
    padded_cu[:3] = cu_rows
    padded_table = torch.full((places, table.shape[1] + 6), -5, dtype=torch.int32, device=DEVICE)
    padded_table[:2, : table.shape[1]] = table
    cut = tiling(torch.float32, chunk=chunk)
    launch.row_attention(q, padded_rows, padded_cu, padded_table, kv, out=out, tiling=cut)
    want = reference.row_attention(q[:n].double(), rows, cu_rows, table, kv.double())
    assert error(out[:n], want) < BOUND[torch.float32]
    assert (out[n:] == (0.0 if chunk else 7.0)).all()


class Variant:
    """A compiled kernel that notes what it is launched with."""

    def __init__(self) -> None:
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args: self.launches.append((grid, args))


class Compiler(Variant):
    """A kernel whose launches give the variant that was compiled for them."""

    arg_names = ("x", "n", "BLOCK", "PAD")

    def __getitem__(self, grid):
        def launched(*args, **named):
            self.launches.append((grid, args, named))
            return Variant() if len(self.launches) < 2 else self.variant

        return launched


def test_a_bound_kernel_looks_at_its_arguments_only_when_they_have_changed():
    kernel, memory = Compiler(), torch.zeros(64)
    kernel.variant = Variant()
    bound = BoundKernel(kernel, (2, 1, 1), {"PAD": 8, "BLOCK": 4}, num_warps=4)
    even, odd = memory[:32], memory[1:33]
    bound((odd,), (5,))
    bound((even,), (5,))  # another alignment is another variant
    assert [grid for grid, *_ in kernel.launches] == [(2, 1, 1)] * 2
    assert kernel.launches[0][2] == {"PAD": 8, "BLOCK": 4, "num_warps": 4}
    bound((even,), (5,))
    assert len(kernel.launches) == 2
    [(grid, args)] = kernel.variant.launches
    assert grid == (2, 1, 1) and args[0] is even and args[1:] == (5, 4, 8)  # constants in the signature's order


def test_a_bound_kernel_lets_tensors_lie_anywhere_that_it_does_not_specialise_on():
    kernel, memory = Compiler(), torch.zeros(64)
    kernel.variant = Variant()
    bound = BoundKernel(kernel, (2, 1, 1), {"PAD": 8, "BLOCK": 4}, anywhere=(0,))
    for start in (0, 1, 2):
        bound((memory[start : start + 32],), (5,))
    assert len(kernel.launches) == 1


def placing(layers, n, heads, dim, block, dtype, rounds=200):
    """Rows, slots (a third skipped), deltas of both signs, and poisoned caches twice."""
    k = torch.randn(layers, n, heads, dim).to(DEVICE, dtype)
    v = torch.randn(layers, n, heads, dim).to(DEVICE, dtype)
    blocks = -(-n // block) + 3
    slots = torch.randperm(blocks * block)[:n]
    slots[::3] = -1
    deltas = torch.randint(-rounds + 1, rounds, (n,)).int()
    kv = [torch.full((blocks, heads, block, 2 * dim), float("nan")).to(DEVICE, dtype) for _ in range(2 * layers)]
    rotary = Rotary(inverse_frequencies(dim, 1e4), rounds, DEVICE)
    return k, v, slots.to(DEVICE), deltas.to(DEVICE), kv[:layers], kv[layers:], rotary


def test_chunks_of_one_shape_share_a_launch():
    """Groups of layers from a ring of buffers, parts of a request that start anywhere."""
    k, v, slots, deltas, mine, plain, rotary = placing(4, 30, 2, 64, 16, torch.float32)
    placement._bound.cache_clear()
    for part in (slice(0, 15), slice(15, 30)):
        for group in (slice(0, 2), slice(2, 4)):
            moved = k[group, part].clone(), v[group, part].clone(), slots[part], deltas[part]
            placement.place_layers(*moved, mine[group], rotary)
            placement_reference.place_layers(*moved, plain[group], rotary)
    assert placement._bound.cache_info().misses == 1
    for x, y in zip(mine, plain, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layers,n,heads,dim", [(3, 37, 2, 64), (1, 1, 5, 80), (2, 50, 3, 50), (1, 20, 8, 128)])
@pytest.mark.parametrize("moved", [True, False])
def test_placement(moved, layers, n, heads, dim, dtype):
    k, v, slots, deltas, mine, plain, rotary = placing(layers, n * SIZE, heads, dim, 16, dtype)
    mine = [other_layout(kv) for kv in mine]
    placement.place_layers(k, v, slots, deltas if moved else None, mine, rotary)
    placement_reference.place_layers(k, v, slots, deltas if moved else None, plain, rotary)
    for got, want in zip(mine, plain, strict=True):
        assert torch.equal(got.isnan(), want.isnan())  # every row that was asked for, and no other
        # The kernel may fuse a product and a sum: one unit in the last place of the result.
        torch.testing.assert_close(got[~got.isnan()], want[~want.isnan()], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_turn_beyond_the_tables_is_loud():
    k, v, slots, deltas, kv, _, rotary = placing(1, 9, 2, 16, 16, torch.float32)
    deltas[4] = -rotary.max_positions
    placement.place_layers(k, v, slots, deltas, kv, rotary)
    at = int(slots[4])
    assert kv[0][at // 16, :, at % 16, :16].isnan().all() and not kv[0][at // 16, :, at % 16, 16:].isnan().any()
    at = int(slots[5])
    assert not kv[0][at // 16, :, at % 16].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n,heads,dim", [(1, 1, 16), (33, 3, 50), (20, 8, 128)])
def test_deviation(n, heads, dim, dtype):
    k, v, _, deltas, *_, rotary = placing(1, n * SIZE, heads, dim, 16, dtype)
    for by in (deltas, None):
        want = placement_reference.row_deviation(v[0], k[0], by, rotary)
        torch.testing.assert_close(placement.row_deviation(v[0], k[0], by, rotary), want, rtol=2e-3, atol=0)


@gpu
@pytest.mark.skipif(INTERPRETED, reason="needs CUDA")
def test_rows_in_pinned_host_memory():
    k, v, slots, deltas, mine, plain, rotary = placing(2, 300, 8, 128, 16, torch.bfloat16)
    placement.place_layers(k.cpu().pin_memory(), v.cpu().pin_memory(), slots, deltas, mine, rotary)
    placement.place_layers(k, v, slots, deltas, plain, rotary)
    for got, want in zip(mine, plain, strict=True):
        assert torch.equal(got.view(torch.int16), want.view(torch.int16))


@gpu
@pytest.mark.skipif(INTERPRETED, reason="needs CUDA")
@pytest.mark.parametrize("heads,kv_heads", [(32, 8), (28, 4), (32, 32)])
@pytest.mark.parametrize("chunk", [0, 1024])
def test_a_long_packed_batch(chunk, heads, kv_heads):
    cut = launch.Tiling(chunk=chunk)
    check_attention([8192, 500, 4097, 3], [0.26, 0.9, 0.05, 0.0], heads, kv_heads, 128, 16, torch.bfloat16, tiling=cut)


@gpu
@pytest.mark.skipif(INTERPRETED, reason="needs CUDA")
@pytest.mark.parametrize("lanes,warps,stages", [(128, 8, 4), (64, 4, 3)])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 129, 3000])
def test_tiles_of_real_size_at_every_edge(length, lanes, warps, stages):
    for share in (1 / length, 1.0):
        cut = launch.Tiling(lanes=lanes, warps=warps, stages=stages)
        check_attention([length, 40], [share, 0.5], 6, 2, 128, 16, torch.float16, tiling=cut)
