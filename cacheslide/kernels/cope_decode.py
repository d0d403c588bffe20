"""Triton kernels: CoPE attention of one row a request (decoding), split over the keys.

Gate sums run from right to left, so a chunk of keys must know the gates of all chunks to its right. Each program reads
its chunk's keys, publishes the sum of its gates, and waits for the sums of the programs to its right, which have lower
program ids and were started before it; its values are on their way meanwhile. Keys and values are read once.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from cacheslide.kernels.attention import _merge
from cacheslide.kernels.cope_launch import _ASM, Blocks
from cacheslide.kernels.cope_tiles import gates_of, load, look_up


@triton.jit
def _prepare(
    q, embedding, entries, sums, chunks, q_row, q_head, e_row,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAD_DIM: tl.constexpr, P_MAX: tl.constexpr, PAD_P: tl.constexpr,
    LANES: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Position logits (base 2) of one row and KV head; -1 where the bits of sums will appear, none of that sign."""
    row, kv_head = tl.program_id(0), tl.program_id(1)
    lane, d, p = tl.arange(0, LANES), tl.arange(0, PAD_DIM), tl.arange(0, PAD_P)
    there = (lane < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    at = q + row.to(tl.int64) * q_row + (kv_head * GROUP + lane)[:, None] * q_head + d[None, :]
    queries = tl.load(at, mask=there, other=0.0)
    known = (d < HEAD_DIM)[None, :] & (p < P_MAX)[:, None]
    embedded = tl.load(embedding + p[:, None] * e_row + d[None, :], mask=known, other=0.0)
    logits = tl.dot(queries, tl.trans(embedded), input_precision=PRECISION) * 1.4426950408889634
    pair = (row * tl.num_programs(1) + kv_head).to(tl.int64)
    entries += pair * ((PAD_P + 1) * LANES)
    tl.store(entries + p[None, :] * LANES + lane[:, None], logits)
    tl.store(entries + PAD_P * LANES + lane, tl.zeros([LANES], tl.float32))
    sums += pair * chunks * LANES
    for i in range(0, chunks * LANES, BLOCK):
        index = i + tl.arange(0, BLOCK)
        tl.store(sums + index, tl.full([BLOCK], -1, tl.int32), mask=index < chunks * LANES)


@triton.jit(do_not_specialize=["requests", "chunks"])
def _decode(
    q, rows, table, k, v, entries, sums, out, lse, requests, chunks, scale,
    q_row, q_head, out_chunk, lse_chunk, table_row, kv_block, kv_head, kv_slot,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAD_DIM: tl.constexpr,
    LAST: tl.constexpr, PAD_P: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr, AHEAD: tl.constexpr,
    PRECISION: tl.constexpr, ASM: tl.constexpr, KV_HEADS: tl.constexpr,
):  # fmt: skip
    """One chunk of keys of one request and KV head. `scale` includes log2(e)."""
    pairs = requests * KV_HEADS
    right = tl.program_id(0) // pairs  # chunks between this one and the row
    pair = tl.program_id(0) % pairs
    request = pair // KV_HEADS
    limit = tl.load(rows + request) + 1
    chunk = (limit - 1) // CHUNK - right
    if chunk < 0:
        return
    lane, d = tl.arange(0, LANES), tl.arange(0, PAD_DIM)
    head = (pair % KV_HEADS) * GROUP + lane
    wide = (d < HEAD_DIM)[None, :]
    at = q + request.to(tl.int64) * q_row + head[:, None] * q_head + d[None, :]
    queries = tl.load(at, mask=(lane < GROUP)[:, None] & wide, other=0.0)
    keys = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = tl.minimum(keys, limit - 1)  # keys behind the row may hold anything, NaN included
    blocks = tl.load(table + request.to(tl.int64) * table_row + inside // BLOCK_SIZE)
    offsets = blocks.to(tl.int64) * kv_block + (inside % BLOCK_SIZE).to(tl.int64) * kv_slot
    offsets += (pair % KV_HEADS).to(tl.int64) * kv_head
    key_rows = load(k + offsets[:, None] + d[None, :], wide, PAD_DIM > HEAD_DIM)
    values = load(v + offsets[:, None] + d[None, :], wide, PAD_DIM > HEAD_DIM)
    scores = tl.dot(queries, tl.trans(key_rows), input_precision=PRECISION) * scale
    seen = (keys < limit)[None, :]
    gates = tl.where(seen, gates_of(scores), 0.0)
    total = tl.sum(gates, 1)
    sums += pair.to(tl.int64) * chunks * LANES
    # A NaN must not be published: those that wait for a sum would wait for ever.
    published = tl.where(total >= 0, total, 0.0).to(tl.int32, bitcast=True)
    tl.atomic_xchg(sums + right * LANES + lane, published, sem="relaxed")

    carry = tl.zeros([LANES], tl.float32)
    for first in range(0, right, AHEAD):
        others = first + tl.arange(0, AHEAD)
        there = sums + others[:, None] * LANES + lane[None, :]
        found = tl.load(there, mask=(others < right)[:, None], other=0, volatile=True)
        while tl.min(tl.min(found, 1), 0) < 0:
            found = tl.load(there, mask=(others < right)[:, None], other=0, volatile=True)
        carry += tl.sum(found.to(tl.float32, bitcast=True), 0)

    entries += pair.to(tl.int64) * ((PAD_P + 1) * LANES)
    least = tl.min(tl.where(lane < GROUP, carry, LAST), 0)
    if least < LAST:
        position = (carry + total)[:, None] - tl.cumsum(gates, 1) + gates
        scores += look_up(entries, lane, tl.maximum(position, 0.0), LAST, LANES, ASM)
    else:
        scores += tl.load(entries + LAST * LANES + lane)[:, None]
    scores = tl.where(seen, scores, float("-inf"))
    top = tl.max(scores, 1)
    weights = tl.exp2(scores - top[:, None])
    mass = tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, input_precision=PRECISION) / mass[:, None]
    heads: tl.constexpr = KV_HEADS * GROUP
    place = (request * heads + head).to(tl.int64)
    tl.store(lse + chunk * lse_chunk + place, top + tl.log2(mass), mask=lane < GROUP)
    at = out + chunk.to(tl.int64) * out_chunk + place[:, None] * HEAD_DIM + d[None, :]
    tl.store(at, acc, mask=(lane < GROUP)[:, None] & wide)


def cope_decode(
    q: Tensor,
    rows: Tensor,
    blocks: Blocks,
    embedding: Tensor,
    scale: float | None = None,
    out: Tensor | None = None,
    max_row: int | None = None,
    chunk: int = 128,
) -> Tensor:
    """See `cacheslide.kernels.cope.cope_decode`; `chunk` keys, a power of two, go to one program."""
    n, heads, dim = q.shape
    kv_heads, block_size = blocks.k.shape[1:3]
    out = torch.empty_like(q) if out is None else out
    if not n:
        return out
    group, p_max = heads // kv_heads, embedding.shape[0]
    lanes, padded = max(16, triton.next_power_of_2(group)), max(16, triton.next_power_of_2(dim))
    padded_p = max(16, triton.next_power_of_2(p_max))
    span = blocks.table.shape[1] * block_size if max_row is None else max_row + 1
    chunks = triton.cdiv(span, chunk)
    sums = torch.empty(n, kv_heads, chunks, lanes, dtype=torch.int32, device=q.device)
    entries, parts, lse = (
        torch.empty(shape, dtype=torch.float32, device=q.device)
        for shape in ((n, kv_heads, padded_p + 1, lanes), (chunks, n, heads, dim), (chunks, n, heads))
    )
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    sizes = {"GROUP": group, "HEAD_DIM": dim, "PAD_DIM": padded, "PAD_P": padded_p, "LANES": lanes}
    sizes["PRECISION"] = precision
    _prepare[(n, kv_heads)](
        q, embedding, entries, sums, chunks, *q.stride()[:2], embedding.stride(0), P_MAX=p_max, BLOCK=1024, **sizes
    )
    scale = (dim**-0.5 if scale is None else scale) * math.log2(math.e)
    _decode[(chunks * n * kv_heads,)](
        q, rows, blocks.table, blocks.k, blocks.v, entries, sums, parts, lse, n, chunks, scale,
        *q.stride()[:2], parts.stride(0), lse.stride(0), blocks.table.stride(0), *blocks.strides,
        BLOCK_SIZE=block_size, LAST=p_max - 1, CHUNK=chunk, AHEAD=64, ASM=_ASM, KV_HEADS=kv_heads, **sizes,
        num_warps=8 if chunk > 128 else 4,
    )  # fmt: skip
    block = max(1, 2048 // padded)
    _merge[(triton.cdiv(n * heads, block),)](
        parts, lse, rows, out, n, heads, chunk, parts.stride(0), out.stride(0), out.stride(1),
        HEAD_DIM=dim, PAD_DIM=padded, BLOCK=block,
    )  # fmt: skip
    return out
