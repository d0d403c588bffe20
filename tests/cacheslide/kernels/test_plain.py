"""The plain kernels against the model's own maths, the dispatch, and the Triton kernels under Triton's interpreter."""

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from cacheslide.kernels import api as kernels
from cacheslide.models.attention import row_attention as model_attention
from cacheslide.policies.deviation import deviation
from cacheslide.positions.rope import Rotary, inverse_frequencies
from tests.helpers.paged_rows import other_layout, paged, passes_interpreted, scattered
from tests.helpers.places import ROOT


@pytest.mark.parametrize("heads,kv_heads,dim", [(4, 4, 10), (6, 2, 16), (8, 1, 9)])
def test_plain_attention_is_the_models_attention(heads, kv_heads, dim):
    lengths = [300, 17, 40, 1]
    kv, table, dense = paged(lengths, kv_heads, dim, 16, seed=1)
    rows, cu_rows = scattered(lengths, [0.95, 1.0, 0.0, 1.0], seed=2)
    q = torch.randn(len(rows), heads, dim)
    out = kernels.row_attention(q, rows, cu_rows, table, other_layout(kv))
    for (begin, end), (k, v) in zip(pairwise(cu_rows.tolist()), dense, strict=True):
        if begin < end:
            want = model_attention(q[begin:end], k, v, rows[begin:end].long())
            torch.testing.assert_close(out[begin:end], want, rtol=1e-5, atol=1e-5)


def test_attention_writes_where_it_is_told_and_scales():
    kv, table, _ = paged([20], 2, 8, 16, seed=3)
    rows, cu_rows = scattered([20], [0.5], seed=4)
    q, out = torch.randn(10, 4, 8), torch.full((10, 4, 8), float("nan"))
    assert kernels.row_attention(q, rows, cu_rows, table, kv, scale=0.5, out=out) is out
    plain = kernels.row_attention(q * 0.5 * 8**0.5, rows, cu_rows, table, kv)
    torch.testing.assert_close(out, plain)


def test_no_rows_at_all_are_no_error():
    kv, table, _ = paged([5], 2, 8, 16, seed=5)
    none = torch.zeros(0, dtype=torch.int32)
    assert kernels.row_attention(torch.empty(0, 4, 8), none, torch.zeros(2).int(), table, kv).shape == (0, 4, 8)
    before = kv.clone()
    rotary = Rotary(inverse_frequencies(8, 1e4), 64)
    empty, nowhere = torch.empty(1, 0, 2, 8), torch.tensor([-1, -1])
    kernels.place_layers(empty, empty, none.long(), none, [kv], rotary)
    kernels.place_layers(torch.ones(1, 2, 2, 8), torch.ones(1, 2, 2, 8), nowhere, none, [kv], rotary)
    assert torch.equal(kv.nan_to_num(9.0), before.nan_to_num(9.0))
    assert kernels.row_deviation(torch.empty(0, 2, 8), torch.empty(0, 2, 8), None, rotary).shape == (0,)


def test_plain_deviation_is_the_corrections():
    rotary = Rotary(inverse_frequencies(10, 1e4), 128)
    fresh, cached, deltas = torch.randn(9, 2, 10), torch.randn(9, 2, 10), torch.arange(-4, 5)
    want = deviation(fresh, rotary.rotate(cached, deltas))
    torch.testing.assert_close(kernels.row_deviation(fresh, cached, deltas.int(), rotary), want)
    turned = rotary.rotate(cached, deltas)
    assert kernels.row_deviation(turned, cached, deltas, rotary).max() == 0


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"q": torch.randn(3, 4, 8, dtype=torch.float64)}, "float64"),
        ({"q": torch.randn(3, 4, 6)}, "do not fit"),
        ({"q": torch.randn(3, 3, 8)}, "do not fit"),
        ({"q": torch.randn(3, 8, 4).transpose(1, 2)}, "contiguous"),
        ({"scale": -1.0}, "above 0"),
    ],
)
def test_attention_refuses_what_it_cannot_do(change, reason):
    kv, table, _ = paged([3], 2, 8, 16, seed=6)
    given = {"q": torch.randn(3, 4, 8), "rows": torch.arange(3).int(), "cu_rows": torch.tensor([0, 3]).int()}
    given |= {"block_table": table, "kv": kv} | change
    with pytest.raises(ValueError, match=reason):
        kernels.row_attention(**given)


@pytest.mark.slow
def test_a_cpu_call_needs_no_triton():
    """A machine without Triton can import the package and run the plain kernels."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from cacheslide.kernels import api as kernels\n"
        "z = torch.zeros(1, 1, 2); i = torch.zeros(1).int()\n"
        "kernels.row_attention(z, i, torch.tensor([0, 1]), i[None], torch.zeros(1, 1, 16, 4)); print('ran')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "ran", done.stderr


def test_what_a_bound_launch_does_not_watch_is_what_triton_leaves_alone():
    """Triton compiles a variant for the alignment of every other tensor, and numbers come behind all tensors."""
    attention = pytest.importorskip("cacheslide.kernels.row_attention.triton")
    placement = pytest.importorskip("cacheslide.kernels.placement.triton")
    for kernel, tensors, anywhere in (
        (placement._place, 7, placement._ANYWHERE),
        (attention._row_attention, 7, ()),
        (attention._merge, 4, ()),
    ):
        if not hasattr(kernel, "params"):
            pytest.skip("kernels were imported under Triton's interpreter: TRITON_INTERPRET is set")
        loose = [i for i, p in enumerate(kernel.params[:tensors]) if p.do_not_specialize_on_alignment]
        assert loose == list(anywhere) and not any(p.is_constexpr for p in kernel.params[:tensors])
        constants = [p.is_constexpr for p in kernel.params]
        assert constants == sorted(constants)


@pytest.mark.slow
def test_triton_kernels_under_the_interpreter():
    passes_interpreted("tests/cacheslide/kernels/row_attention/test_triton.py", 30)


LOADS = ((416, 4096), (608, 4096), (896, 8192), (1152, 8192))  # rows and span of loads: 4k and 8k at 5 and 10 %


def test_the_rule_for_tiles():
    """Few tiles and the uneven ones of a load are cut along the keys; dense rows are not packed; small devices get
    fewer stages."""
    pytest.importorskip("triton")
    launch = pytest.importorskip("cacheslide.kernels.row_attention.launch")
    work = launch.Work(410, 1, 8192, 32, 8, 128, 16, torch.bfloat16)
    few, many = launch.choose_tiling(work), launch.choose_tiling(replace(work, rows=2130))
    assert few.chunk == 2048 and many.chunk == 0 and many.pack
    assert [launch.choose_tiling(replace(work, rows=n, span=t)).chunk for n, t in LOADS] == [1024, 1024, 2048, 0]
    assert not launch.choose_tiling(replace(work, rows=8192)).pack
    tiny = launch.Device(132, 100 << 10)
    assert launch._shared_bytes(launch.choose_tiling(replace(work, rows=2130), tiny), 128) <= 100 << 10
