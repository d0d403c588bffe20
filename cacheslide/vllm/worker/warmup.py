"""Compiles the kernels before the first request: compiling takes seconds, longer than a prefill."""

import logging
import time

import torch

from cacheslide.kernels import api as kernels
from cacheslide.kernels.cope import decode as cope_decode
from cacheslide.kernels.cope import launch as cope_launch
from cacheslide.kernels.row_attention import launch
from cacheslide.positions.ccpe import PromptSlots, pack_slots
from cacheslide.vllm.worker.model_adapter import VllmModel

logger = logging.getLogger("vllm.cacheslide")
_ROWS, _SPANS = (16, 128, 512, 1024, 2048, 4096, 8192), (2048, 8192, 32768)


def warm_up(model: VllmModel, max_tokens: int) -> None:
    """Launch every kernel once in all variants needed by prompts of up to `max_tokens` tokens."""
    started = time.perf_counter()
    attention = model.layers[0].self_attn
    heads, kv_heads, dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
    kv, device = model.paged[0].cache, model.device
    size, count = kv.shape[2], 64  # rows of the launches; only the variants matter
    q = torch.zeros(count, heads, dim, dtype=model.dtype, device=device)
    rows, bounds = torch.arange(count, dtype=torch.int32, device=device), torch.tensor([0, count], dtype=torch.int32)
    table = torch.zeros(1, -(-max_tokens // size), dtype=torch.int32, device=device)
    cope = model.slot_offsets is not None
    tilings = set()
    for span in _SPANS:
        for n in _ROWS:
            if n <= span <= max(max_tokens, _SPANS[0]):
                work = launch.Work(n, 1, span, heads, kv_heads, dim, size, model.dtype)
                rule = cope_launch.choose_tiling(work) if cope else launch.choose_tiling(work, launch.device_of(q))
                tilings.add(rule)
    shared = q, rows, bounds.to(device)
    for tiling in tilings:
        if cope:
            _launch_cope(model, shared, cope_launch.paged(kv, table), tiling)
        else:
            launch.row_attention(*shared, table, kv, model.scale, max_row=count - 1, tiling=tiling)
    if cope:
        _launch_decoding(model, q, table, max_tokens)
    k = torch.zeros(model.num_layers, count, kv_heads, dim, dtype=model.dtype, device=device)
    nowhere = torch.full((count,), -1, dtype=torch.int64, device=device)
    turns = torch.zeros(count, dtype=torch.int32, device=device)
    caches, pointers = model.caches.get()
    for deltas in (turns, None) if model.rotates else (None,):
        kernels.place_layers(k, k, nowhere, deltas, caches, model.rotaries[0], pointers)
        kernels.row_deviation(k[0], k[0], deltas, model.rotaries[0])
    torch.cuda.synchronize(device)
    logger.info("CacheSlide's kernels: %d tilings, %.1f s", len(tilings), time.perf_counter() - started)


def _launch_cope(
    model: VllmModel,
    shared: tuple[torch.Tensor, ...],
    blocks: cope_launch.Blocks,
    tiling: cope_launch.CopeTiling,
) -> None:
    """CoPE attention without slots, and with them if the model has offsets."""
    table, offsets = model.layers[0].self_attn.attn.cope_positions, model.slot_offsets
    rows = shared[1]
    kinds = [None]
    if offsets.known:
        packed = pack_slots([(PromptSlots(((1, 2),), torch.ones(len(rows), dtype=torch.bool)), rows.long())])
        kinds.append(packed.with_offsets(offsets.offsets[0], offsets.cap))
    for slots in kinds:
        cope_launch.cope_attention(
            *shared, blocks, table, model.scale, max_row=len(rows) - 1, slots=slots, tiling=tiling
        )


def _launch_decoding(model: VllmModel, q: torch.Tensor, table: torch.Tensor, max_tokens: int) -> None:
    """CoPE attention of decoding rows at both tilings; steps without a graph choose by batch and length."""
    blocks = cope_launch.paged(model.paged[0].cache, table)
    rows = torch.zeros(1, dtype=torch.int32, device=q.device)
    embedding, units = model.layers[0].self_attn.attn.cope_positions, launch.device_of(q).multiprocessors
    kv_heads = blocks.k.shape[1]
    for n, span in ((1, 1), (1024, max_tokens)):
        tiling = cope_decode.choose_decode_tiling(n, kv_heads, span, units)
        cope_decode.cope_decode(q[:1], rows, blocks, embedding, model.scale, max_row=0, tiling=tiling)
