"""The CoPE backend's view of a batch, without an engine: rows, padding, captured graphs, slots by blocks."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from cacheslide.errors import ConfigError, ModelError
from cacheslide.kernels.cope.reference import cope_attention
from cacheslide.positions.ccpe import PromptSlots, pack_slots
from cacheslide.vllm.cope.backend import CopeBackend, CopeImpl, CopeMetadataBuilder
from cacheslide.vllm.cope.slots import LayerOffsets, SlotRows

pytestmark = pytest.mark.vllm
BLOCK, MANAGER, HEADS, DIM = 16, 32, 4, 8  # a kernel may see the scheduler's block as two


def builder(offsets=None) -> CopeMetadataBuilder:
    layer = SimpleNamespace(cope_offsets=LayerOffsets(offsets))
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=256, max_num_seqs=8),
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=[1, 8], static_forward_context={"a": layer}),
        model_config=SimpleNamespace(max_model_len=512),
        speculative_config=None,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )
    return CopeMetadataBuilder(None, ["a"], config, torch.device("cpu"))


def batch(lengths, computed, prefilling=None, pad=0) -> CommonAttentionMetadata:
    """Requests with `lengths` new rows behind `computed` ones; `pad` empty requests as in a captured graph."""
    ends = torch.tensor([0, *lengths, *[0] * pad], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    seq_lens = torch.tensor([a + b for a, b in zip(lengths, computed, strict=True)] + [0] * pad, dtype=torch.int32)
    tokens = int(ends[-1]) + pad
    return CommonAttentionMetadata(
        query_start_loc=ends,
        query_start_loc_cpu=ends,
        seq_lens=seq_lens,
        num_reqs=len(seq_lens),
        num_actual_tokens=tokens,
        max_query_len=max(lengths),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=torch.zeros(len(seq_lens), 8, dtype=torch.int32),
        slot_mapping=torch.zeros(tokens, dtype=torch.int64),
        is_prefilling=None if prefilling is None else torch.tensor(prefilling),
    )


def test_rows_are_places_in_the_prompts():
    made = builder().build(0, batch([1, 1, 5, 3], [40, 7, 0, 90]))
    assert made.decodes == 2 and made.bounds.tolist() == [0, 5, 8] and made.max_row == 92
    assert made.decoding.tolist() == [40, 7] and made.rows.tolist() == [*range(5), 90, 91, 92]
    assert len(made.decode_table) == len(made.block_table) == 2
    only = builder().build(0, batch([4, 2], [10, 0]))
    assert only.decodes == 0 and only.bounds.tolist() == [0, 4, 6] and only.rows.tolist() == [10, 11, 12, 13, 0, 1]


def test_a_prompts_single_row_is_no_decoded_one_where_slots_are_crossed():
    asked = batch([1, 1, 3], [40, 128, 0], [False, True, True])
    assert builder().build(0, asked).decodes == 2
    built = builder(torch.ones(1, 2, HEADS)).build(0, asked)
    assert built.decodes == 1 and built.bounds.tolist() == [0, 1, 4]
    assert built.decoding.tolist() == [40] and built.rows.tolist() == [128, 0, 1, 2]


def test_a_captured_graph_finds_new_rows_where_it_looks():
    made = builder()
    assert made.get_cudagraph_support(None, None) is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    captured = made.build_for_cudagraph_capture(batch([1] * 8, [30] * 8))
    assert captured.decodes == 8 and captured.max_row == 511 and not captured.decoding.any()
    replayed = made.build(0, batch([1] * 5, [30, 2, 99, 4, 5], pad=3))
    assert replayed.decodes == 8 and replayed.decoding.data_ptr() == captured.decoding.data_ptr()
    assert captured.decoding.tolist() == [30, 2, 99, 4, 5, 0, 0, 0]  # padding reads row 0, which is there


def test_a_cache_takes_rows_and_leaves_padding_out():
    impl = CopeImpl(HEADS, DIM, 1.0, 2)
    cache = torch.full((3, 2, BLOCK, 2 * DIM), float("nan"))
    k, v = torch.randn(4, 2, DIM), torch.randn(4, 2, DIM)
    impl.do_kv_cache_update(None, k, v, cache, torch.tensor([5, -1, 17]))  # one row more than slots
    assert torch.equal(cache[0, :, 5], torch.cat((k[0], v[0]), -1))
    assert torch.equal(cache[1, :, 1], torch.cat((k[2], v[2]), -1))
    assert cache.isfinite().any(-1).sum() == 4


def prompt_slots(rows: int, seed: int, count: int) -> PromptSlots:
    """`count` disjoint slots, and flags that are not simply the rows outside them."""
    g = torch.Generator().manual_seed(seed)
    edges = sorted(torch.randperm(rows - 1, generator=g)[: 2 * count].tolist())
    return PromptSlots(tuple(zip(edges[::2], edges[1::2], strict=True)), torch.rand(rows, generator=g) < 0.7)


@pytest.mark.parametrize("cap", [False, True])
def test_slots_are_found_by_the_blocks(cap):
    """What the batch's blocks give is what the requests' own slots give, through the attention itself."""
    g = torch.Generator().manual_seed(3)
    prompts = [60, 100, 45, 80]
    first, new = [0, 37, 44, 64], [60, 50, 1, 17]  # one more row than the last one's prompt has: a generated one
    told = {1: prompt_slots(100, 1, 2), 2: prompt_slots(45, 2, 1), 3: prompt_slots(80, 3, 3)}
    blocks = torch.randperm(64, generator=g)[: 4 * 4].view(4, 4)  # of the scheduler
    table = (blocks[:, :, None] * (MANAGER // BLOCK) + torch.arange(MANAGER // BLOCK)).flatten(1).int()
    rows = torch.cat([torch.arange(a, a + n) for a, n in zip(first, new, strict=True)])
    bounds = torch.tensor([0, *new]).cumsum(0).int()
    offsets = LayerOffsets(torch.rand(2, 3, HEADS, generator=g) * 3, cap)
    step = [SlotRows(tuple(blocks[i].tolist()), first[i], first[i] + new[i], s) for i, s in told.items()]
    absent = SlotRows((99, 99, 99), 0, 20, told[1])  # not in this batch
    offsets.expect([absent, *step], MANAGER)
    made = offsets.of_batch(rows.int(), bounds, table, BLOCK)
    kv = torch.randn(128, 2, BLOCK, 2 * DIM, generator=g)
    q, tables = torch.randn(len(rows), HEADS, DIM, generator=g), torch.randn(2, 9, DIM, generator=g)
    parts = [(told.get(i), torch.arange(first[i], first[i] + n)) for i, n in enumerate(new)]
    packed = pack_slots(parts)
    for layer in range(2):
        shared = q, rows, bounds, table, kv, tables[layer]
        want = cope_attention(*shared, slots=packed.with_offsets(offsets.offsets[layer], cap))
        torch.testing.assert_close(cope_attention(*shared, slots=made[layer]), want)
        apart = (cope_attention(*shared) - want).abs().amax((1, 2)) > 1e-3
        assert apart[60:].any() and not apart[:60].any()
    offsets.expect((), MANAGER)
    assert offsets.of_batch(rows.int(), bounds, table, BLOCK) is None
    assert len(prompts) == len(new)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"kv_cache_dtype": "fp8"}, ConfigError),
        ({"sliding_window": 128}, ModelError),
        ({"alibi_slopes": [1.0]}, ModelError),
        ({"logits_soft_cap": 30.0}, ModelError),
        ({"attn_type": "encoder_only"}, ModelError),
        ({"kv_sharing_target_layer_name": "b"}, ModelError),
    ],
)
def test_what_a_layer_cannot_do_is_refused(settings, error):
    assert CopeBackend.get_impl_cls() is CopeImpl
    with pytest.raises(error, match="CoPE attention does not work with"):
        CopeImpl(HEADS, DIM, 1.0, 2, **settings)
