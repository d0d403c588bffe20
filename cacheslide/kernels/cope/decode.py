"""Triton kernels: CoPE attention of one row a request (decoding), split over the keys.

Gate sums run from right to left, so a chunk of keys needs the gate sums of all chunks to its right. A first launch
reads the keys and writes scores and each chunk's gate sum; a second one reads scores and values. Scores take 4 bytes a
query head and key, keys and values 4 * head_dim bytes a KV head; keys and values are read once. With programmatic
dependent launch (Hopper) the second launch's programs start before the first launch has ended.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from cacheslide.kernels.cope.launch import _ASM, _GATE, Blocks
from cacheslide.kernels.cope.tiles import (
    NEVER,
    beyond,
    block_ids,
    gates_of,
    hinges,
    key_offsets,
    load,
    look_up,
    triangle,
)
from cacheslide.kernels.row_attention.launch import device_of
from cacheslide.kernels.row_attention.triton import _merge


@dataclass(frozen=True)
class DecodeTiling:
    """Each program takes `chunk` keys, a power of two, `keys` at a time; `warps` and `stages` are the launches'.

    With `early` a launch starts before the previous one has ended, where the device supports it.
    """

    chunk: int = 512
    keys: int = 128
    warps: int = 4
    stages: int = 3
    early: bool = True


@triton.jit(do_not_specialize=["requests", "chunks", "span", "table_row"])
def _scores(
    q, rows, table, k, embedding, entries, scores, sums, requests, chunks, span, scale,
    q_row, q_head, table_row, kv_block, kv_head, kv_slot, e_row,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAD_DIM: tl.constexpr,
    P_MAX: tl.constexpr, PAD_P: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, KV_HEADS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Scores and gate sum of one chunk of one request and KV head; the first chunk's program adds position logits.

    `scale` includes log2(e): scores are in base 2.
    """
    if EARLY:
        gdc_launch_dependents()
    pair = tl.program_id(0) % (requests * KV_HEADS)
    chunk = tl.program_id(0) // (requests * KV_HEADS)
    request = pair // KV_HEADS
    limit = tl.load(rows + request) + 1
    begin = chunk * CHUNK
    if begin >= limit:
        return
    lane, d, inner = tl.arange(0, LANES), tl.arange(0, PAD_DIM), tl.arange(0, KEYS)
    valid = (lane < GROUP)[:, None]
    wide = (d < HEAD_DIM)[None, :]
    at = q + request.to(tl.int64) * q_row + ((pair % KV_HEADS) * GROUP + lane)[:, None] * q_head + d[None, :]
    queries = tl.load(at, mask=valid & wide, other=0.0)
    k += (pair % KV_HEADS).to(tl.int64) * kv_head
    table += request.to(tl.int64) * table_row
    scores += pair.to(tl.int64) * GROUP * span
    end = tl.minimum(begin + CHUNK, limit)
    total = tl.zeros([LANES, KEYS], tl.float32)  # summed once, at the end, since that needs all warps
    blocks = block_ids(table, begin, limit, BLOCK_SIZE, KEYS)
    for first in tl.range(begin, end, KEYS, num_stages=STAGES):
        offsets = key_offsets(blocks, first, limit, kv_block, kv_slot, BLOCK_SIZE, KEYS, True)
        blocks = block_ids(table, first + KEYS, limit, BLOCK_SIZE, KEYS)
        key_rows = load(k + offsets[:, None] + d[None, :], wide, PAD_DIM > HEAD_DIM)
        products = tl.dot(queries, tl.trans(key_rows), input_precision=PRECISION) * scale
        keys = first + inner
        seen = (keys < limit)[None, :]
        tl.store(scores + lane[:, None].to(tl.int64) * span + keys[None, :], products, mask=valid & seen)
        total += tl.where(seen, gates_of(products), 0.0)
    tl.store(sums + (pair * chunks + chunk).to(tl.int64) * LANES + lane, tl.sum(total, 1))
    if chunk == 0:
        p = tl.arange(0, PAD_P)
        embedded = tl.load(embedding + p[:, None] * e_row + d[None, :], mask=wide & (p < P_MAX)[:, None], other=0.0)
        logits = tl.dot(queries, tl.trans(embedded), input_precision=PRECISION) * 1.4426950408889634
        entries += pair.to(tl.int64) * ((PAD_P + 1) * LANES)
        tl.store(entries + p[None, :] * LANES + lane[:, None], logits)
        tl.store(entries + PAD_P * LANES + lane, tl.zeros([LANES], tl.float32))


@triton.jit(do_not_specialize=["requests", "chunks", "span", "table_row", "lse_chunk"])
def _attend(
    rows, table, v, entries, scores, sums, out, lse, requests, chunks, span,
    out_chunk, lse_chunk, table_row, kv_block, kv_head, kv_slot,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAD_DIM: tl.constexpr,
    P_MAX: tl.constexpr, PAD_P: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, KV_HEADS: tl.constexpr, EARLY: tl.constexpr, AHEAD: tl.constexpr,
    GATE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Output and softmax sum of one chunk, from its scores, its values and the gate sums of the chunks behind it."""
    if EARLY:
        gdc_launch_dependents()
    LAST: tl.constexpr = P_MAX - 1
    pair = tl.program_id(0) % (requests * KV_HEADS)
    chunk = tl.program_id(0) // (requests * KV_HEADS)
    request = pair // KV_HEADS
    limit = tl.load(rows + request) + 1
    begin = chunk * CHUNK
    if begin >= limit:
        return
    lane, d, inner = tl.arange(0, LANES), tl.arange(0, PAD_DIM), tl.arange(0, KEYS)
    valid = (lane < GROUP)[:, None]
    wide = (d < HEAD_DIM)[None, :]
    v += (pair % KV_HEADS).to(tl.int64) * kv_head
    table += request.to(tl.int64) * table_row
    scores += pair.to(tl.int64) * GROUP * span
    entries += pair.to(tl.int64) * ((PAD_P + 1) * LANES)
    sums += pair.to(tl.int64) * chunks * LANES
    if EARLY:
        gdc_wait()  # the loads below read what the previous launch wrote
    carry = tl.zeros([LANES], tl.float32)
    for behind in range(chunk + 1, (limit - 1) // CHUNK + 1, AHEAD):
        later_chunks = behind + tl.arange(0, AHEAD)
        known = (later_chunks <= (limit - 1) // CHUNK)[:, None]
        carry += tl.sum(tl.load(sums + later_chunks[:, None] * LANES + lane[None, :], mask=known, other=0.0), 0)
    top = tl.full([LANES], float("-inf"), tl.float32)
    mass = tl.zeros([LANES], tl.float32)
    acc = tl.zeros([LANES, PAD_DIM], tl.float32)
    base = tl.full([LANES], NEVER, tl.float32)
    level = tl.zeros([LANES], tl.float32)
    slope = tl.zeros([LANES], tl.float32)
    kink1 = tl.zeros([LANES], tl.float32)
    kink2 = tl.zeros([LANES], tl.float32)
    constant = tl.load(entries + LAST * LANES + lane)
    ones = triangle(KEYS, GATE)
    tiles = tl.cdiv(tl.minimum(begin + CHUNK, limit) - begin, KEYS)
    start = begin + (tiles - 1) * KEYS
    blocks = block_ids(table, start, limit, BLOCK_SIZE, KEYS)
    scores += lane[:, None].to(tl.int64) * span + inner[None, :]
    ahead = tl.load(scores + start, mask=valid & (start + inner < limit)[None, :], other=float("-inf"))
    done = tl.min(tl.where(lane < GROUP, carry, LAST), 0) >= LAST
    for i in tl.range(0, tiles, num_stages=STAGES):
        first = start - i * KEYS
        offsets = key_offsets(blocks, first, limit, kv_block, kv_slot, BLOCK_SIZE, KEYS, True)
        # Block ids and scores are loaded one tile ahead.
        blocks = block_ids(table, first - KEYS, limit, BLOCK_SIZE, KEYS)
        values = load(v + offsets[:, None] + d[None, :], wide, PAD_DIM > HEAD_DIM)
        logits = ahead
        keys = first - KEYS + inner
        ahead_valid = valid & ((keys >= begin) & (keys < limit))[None, :]
        ahead = tl.load(scores + first - KEYS, mask=ahead_valid, other=float("-inf"))
        if done:
            logits += constant[:, None]
        else:
            gates = gates_of(logits)  # 0 where there is no key
            before = carry
            sums_here = tl.zeros([LANES, KEYS], tl.float32) + carry[:, None]
            position = tl.dot(gates.to(ones.dtype), ones, sums_here, input_precision=PRECISION)
            carry = tl.max(position, 1)  # gates are not negative: the leftmost key has the largest sum
            reach = beyond(base, carry, LAST)
            if reach > 3.0:
                base, level, slope, kink1, kink2 = hinges(entries, lane, before, LAST, LANES, ASM)
                reach = beyond(base, carry, LAST)
            if reach > 3.0:
                logits += look_up(entries, lane, tl.maximum(position, 0.0), LAST, LANES, ASM)
            else:
                logits += position * slope[:, None] + level[:, None]
                logits += tl.maximum(position - (base + 1)[:, None], 0.0) * kink1[:, None]
                logits += tl.maximum(position - (base + 2)[:, None], 0.0) * kink2[:, None]
            done = tl.min(tl.where(lane < GROUP, carry, LAST), 0) >= LAST
        higher = tl.maximum(top, tl.max(logits, 1))
        lower = tl.where(higher == float("-inf"), 0.0, higher)  # lanes without a head
        weights = tl.exp2(logits - lower[:, None])
        shrink = tl.exp2(top - lower)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
        mass = mass * shrink + tl.sum(weights, 1)
        top = higher
    heads: tl.constexpr = KV_HEADS * GROUP
    place = (request * heads + (pair % KV_HEADS) * GROUP + lane).to(tl.int64)
    tl.store(lse + chunk * lse_chunk + place, top + tl.log2(mass), mask=lane < GROUP)
    at = out + chunk.to(tl.int64) * out_chunk + place[:, None] * HEAD_DIM + d[None, :]
    tl.store(at, acc / mass[:, None], mask=valid & wide)


def choose_decode_tiling(requests: int, kv_heads: int, span: int, multiprocessors: int) -> DecodeTiling:
    """Tiling from a sweep on an H200 (docs/log.md): with many keys one warp a program, which needs no barriers."""
    if requests * kv_heads * span >= 4 * multiprocessors * 1024:
        return DecodeTiling(chunk=1024, keys=32, warps=1)
    return DecodeTiling(chunk=512)


def cope_decode(
    q: Tensor,
    rows: Tensor,
    blocks: Blocks,
    embedding: Tensor,
    scale: float | None = None,
    out: Tensor | None = None,
    max_row: int | None = None,
    tiling: DecodeTiling | None = None,
) -> Tensor:
    """See `cacheslide.kernels.cope.api.cope_decode`."""
    n, heads, dim = q.shape
    kv_heads, block_size = blocks.k.shape[1:3]
    out = torch.empty_like(q) if out is None else out
    if not n:
        return out
    group, p_max = heads // kv_heads, embedding.shape[0]
    lanes, padded = max(16, triton.next_power_of_2(group)), max(16, triton.next_power_of_2(dim))
    padded_p = max(16, triton.next_power_of_2(p_max))
    longest = blocks.table.shape[1] * block_size if max_row is None else max_row + 1
    if tiling is None:
        tiling = choose_decode_tiling(n, kv_heads, longest, device_of(q).multiprocessors)
    chunks = triton.cdiv(longest, tiling.chunk)
    span = chunks * tiling.chunk
    sums, entries, scores, parts, lse = (
        torch.empty(shape, dtype=torch.float32, device=q.device)
        for shape in (
            (n, kv_heads, chunks, lanes), (n, kv_heads, padded_p + 1, lanes), (n, heads, span),
            (chunks, n, heads, dim), (chunks, n, heads),
        )
    )  # fmt: skip
    sizes = {"GROUP": group, "HEAD_DIM": dim, "PAD_DIM": padded, "P_MAX": p_max, "PAD_P": padded_p, "LANES": lanes}
    sizes |= {"BLOCK_SIZE": block_size, "CHUNK": tiling.chunk, "KEYS": min(tiling.keys, tiling.chunk)}
    sizes |= {"PRECISION": "ieee" if q.dtype == torch.float32 else "tf32", "STAGES": tiling.stages}
    early = tiling.early and device_of(q).early_launch
    sizes |= {"KV_HEADS": kv_heads, "EARLY": early, "num_warps": tiling.warps}
    follows = {"launch_pdl": True} if early else {}
    grid = (chunks * n * kv_heads,)
    scale = (dim**-0.5 if scale is None else scale) * math.log2(math.e)
    _scores[grid](
        q, rows, blocks.table, blocks.k, embedding, entries, scores, sums, n, chunks, span, scale,
        *q.stride()[:2], blocks.table.stride(0), *blocks.strides, embedding.stride(0), **sizes,
    )  # fmt: skip
    _attend[grid](
        rows, blocks.table, blocks.v, entries, scores, sums, parts, lse, n, chunks, span,
        parts.stride(0), lse.stride(0), blocks.table.stride(0), *blocks.strides, AHEAD=16, GATE=_GATE[q.dtype],
        ASM=_ASM, **sizes, **follows,
    )  # fmt: skip
    block = max(1, 2048 // padded)
    _merge[(triton.cdiv(n * heads, block),)](
        parts, lse, rows, out, n, heads, tiling.chunk, parts.stride(0), out.stride(0), out.stride(1),
        HEAD_DIM=dim, PAD_DIM=padded, BLOCK=block, EARLY=early, **follows,
    )  # fmt: skip
    return out
