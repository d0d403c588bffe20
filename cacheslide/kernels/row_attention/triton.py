"""Triton kernel: causal attention of scattered query rows over a paged KV cache.

A tile holds a few neighbouring rows of all query heads that share a KV head (GQA): one load of a key serves all of
them, and a tile of scattered rows spans fewer keys, so fewer masked products are computed. Keys up to the tile's first
row need no mask and run in a separate loop; keys behind its last row are never read.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit
def _load(at, valid, MASKED: tl.constexpr):
    return tl.load(at, mask=valid, other=0.0) if MASKED else tl.load(at)


@triton.jit
def _block_ids(table, first, limit, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Block ids of keys first..first+BLOCK_N: a scalar if one block holds them all; keys from `limit` on repeat it."""
    if BLOCK_SIZE % BLOCK_N == 0:
        ids = tl.load(table + tl.minimum(first, limit - 1) // BLOCK_SIZE)
    else:
        ids = tl.load(table + tl.minimum(first + tl.arange(0, BLOCK_N), limit - 1) // BLOCK_SIZE)
    return ids


@triton.jit
def _attend(
    acc, top, total, q, q_rows, kv, table, start, stop, limit, scale, kv_block, kv_slot,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, PAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    EDGE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys start..stop (in steps of BLOCK_N); with EDGE, masked by row and cut at `limit`."""
    inner = tl.arange(0, BLOCK_N)
    d = tl.arange(0, PAD_DIM)
    # Block ids are loaded one tile ahead and carried through the loop: dependent loads do not pipeline well.
    blocks = _block_ids(table, start, limit, BLOCK_SIZE, BLOCK_N)
    for first in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        keys = first + inner
        # Keys from `limit` on may be NaN, and 0 * NaN is NaN: the last key replaces them.
        if EDGE:
            inside = tl.minimum(keys, limit - 1) % BLOCK_SIZE
        elif BLOCK_N % BLOCK_SIZE == 0:
            inside = inner % BLOCK_SIZE  # the same for every tile
        else:
            inside = keys % BLOCK_SIZE
        offsets = blocks.to(tl.int64) * kv_block + inside * kv_slot
        at = kv + offsets[:, None] + d[None, :]
        wide = (d < HEAD_DIM)[None, :]
        k = _load(at, wide, PAD_DIM > HEAD_DIM)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        blocks = _block_ids(table, first + BLOCK_N, limit, BLOCK_SIZE, BLOCK_N)
        if EDGE:
            scores = tl.where(keys[None, :] <= q_rows[:, None], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        # The first tile has a key for every row that is stored; -inf - -inf = NaN occurs only in rows that are not.
        weights = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(top - higher)
        v = _load(at + HEAD_DIM, wide, PAD_DIM > HEAD_DIM)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        total = total * shrink + tl.sum(weights, 1)
        top = higher
    return acc, top, total


# Batch sizes and block table widths vary: one compilation serves all.
@triton.jit(do_not_specialize=["requests", "table_row"])
def _row_attention(
    q, rows, cu_rows, table, kv, out, lse, requests, scale, chunk,
    q_row, q_head, out_chunk, out_row, out_head, lse_chunk, lse_row, table_row, kv_block, kv_head, kv_slot,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, HEAD_DIM: tl.constexpr,
    PAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of rows, PACK query heads, and with SPLIT one chunk of `chunk` keys. `scale` includes log2(e)."""
    TILE_ROWS: tl.constexpr = BLOCK_M // PACK
    first_head = tl.program_id(0) * PACK
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest rows first: short ones fill the gaps at the end
    # Request i owns the tiles from cu_rows[i] // TILE_ROWS + i on: an upper bound that needs no host sync.
    request = 0
    beyond = requests
    while beyond - request > 1:
        middle = (request + beyond) // 2
        if tl.load(cu_rows + middle) // TILE_ROWS + middle <= tile:
            request = middle
        else:
            beyond = middle
    begin = tl.load(cu_rows + request)
    end = tl.load(cu_rows + request + 1)
    first = begin + (tile - begin // TILE_ROWS - request) * TILE_ROWS
    if first >= end:
        return
    lane = tl.arange(0, BLOCK_M)
    row = tl.minimum(first + lane // PACK, end - 1)  # lanes beyond the request repeat its last row and store nothing
    live = (first + lane // PACK < end) & (lane < TILE_ROWS * PACK)
    head = first_head + lane % PACK
    q_rows = tl.load(rows + row)
    lowest = tl.load(rows + first)
    limit = tl.load(rows + tl.minimum(first + TILE_ROWS, end) - 1) + 1
    start = 0
    stop = limit
    if SPLIT:
        start = tl.program_id(2) * chunk
        if start >= limit:
            return
        stop = tl.minimum(start + chunk, limit)

    d = tl.arange(0, PAD_DIM)
    row64 = row.to(tl.int64)
    at = q + row64[:, None] * q_row + head[:, None] * q_head + d[None, :]
    queries = _load(at, (d < HEAD_DIM)[None, :], PAD_DIM > HEAD_DIM)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, PAD_DIM], tl.float32)
    kv += (first_head // GROUP).to(tl.int64) * kv_head
    table += request.to(tl.int64) * table_row
    free = tl.maximum(start, tl.minimum((lowest + 1) // BLOCK_N * BLOCK_N, stop))  # keys below need no mask
    acc, top, total = _attend(
        acc, top, total, queries, q_rows, kv, table, start, free, limit, scale, kv_block, kv_slot,
        BLOCK_SIZE, HEAD_DIM, PAD_DIM, BLOCK_N, False, PRECISION, STAGES,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, queries, q_rows, kv, table, free, stop, limit, scale, kv_block, kv_slot,
        BLOCK_SIZE, HEAD_DIM, PAD_DIM, BLOCK_N, True, PRECISION, STAGES,
    )  # fmt: skip
    keep = live
    if SPLIT:
        out += tl.program_id(2).to(tl.int64) * out_chunk
        keep = live & (q_rows >= start)  # rows before this chunk have no key in it
        tl.store(lse + tl.program_id(2) * lse_chunk + row64 * lse_row + head, top + tl.log2(total), mask=keep)
    at = out + row64[:, None] * out_row + head[:, None] * out_head + d[None, :]
    tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask=keep[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=["count"])
def _merge(
    parts, lse, rows, out, count, heads, chunk, part_chunk, out_row, out_head,
    HEAD_DIM: tl.constexpr, PAD_DIM: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Merge the chunks' outputs, weighted by their sums: parts [chunks, n, heads, HEAD_DIM], lse [chunks, n, heads].

    lse is in base 2. Rows of `rows` far enough below 0 have no chunk: their output is 0. EARLY: launched before the
    programs that write the parts have ended.
    """
    if EARLY:
        gdc_wait()
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = pair < count * heads
    row = pair // heads
    d = tl.arange(0, PAD_DIM)
    wide = (d < HEAD_DIM)[None, :]
    chunks = tl.where(live, tl.load(rows + row, mask=live, other=0) // chunk + 1, 0)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, PAD_DIM], tl.float32)
    pair64 = pair.to(tl.int64)
    for i in range(tl.max(chunks, 0)):
        valid = i < chunks
        s = tl.load(lse + i * (count * heads).to(tl.int64) + pair64, mask=valid, other=float("-inf"))
        higher = tl.maximum(top, s)
        weight = tl.where(valid, tl.exp2(s - higher), 0.0)
        shrink = tl.where(valid & (i > 0), tl.exp2(top - higher), 1.0)
        at = parts + i * part_chunk + pair64[:, None] * HEAD_DIM + d[None, :]
        x = tl.load(at, mask=valid[:, None] & wide, other=0.0)
        acc = acc * shrink[:, None] + x * weight[:, None]
        total = total * shrink + weight
        top = tl.where(valid, higher, top)
    at = out + row.to(tl.int64)[:, None] * out_row + (pair % heads)[:, None] * out_head + d[None, :]
    merged = tl.where((chunks > 0)[:, None], acc / total[:, None], 0.0)
    tl.store(at, merged.to(out.dtype.element_ty), mask=live[:, None] & wide)
