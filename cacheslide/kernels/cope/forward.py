"""Triton kernel: causal CoPE attention of scattered query rows over keys and values in blocks.

As in row attention a tile holds neighbouring rows and, packed, the query heads of one KV head. Each tile walks its keys
from right to left: single tiles with masks at the diagonal and at slot edges, runs of unmasked tiles elsewhere. Once
every row's gate sum has reached p_max - 1, all keys further left add the same entry, and plain attention remains.
"""

import triton
import triton.language as tl

from cacheslide.kernels.cope.far import TOO_MUCH, far_tiles
from cacheslide.kernels.cope.tiles import NEVER, block_ids, fetch, gated_tile, key_offsets, load, triangle


# Batch sizes, block table widths and the alignment of a layer's slot offsets vary: one compilation serves all.
@triton.jit(do_not_specialize=["requests", "table_row"], do_not_specialize_on_alignment=["slot_offsets"])
def _cope_attention(
    q, rows, cu_rows, table, k, v, embedding, entries, out, lse,
    slot_bounds, cu_slots, slot_offsets, canonical, requests, heads, scale,
    q_row, q_head, out_row, out_head, lse_row, table_row, kv_block, kv_head, kv_slot, e_row,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, HEAD_DIM: tl.constexpr, PAD_DIM: tl.constexpr,
    P_MAX: tl.constexpr, PAD_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RUN: tl.constexpr,
    FAR_N: tl.constexpr, FAR_STAGES: tl.constexpr, SLOTS: tl.constexpr, CAPPED: tl.constexpr, LSE: tl.constexpr,
    GATE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr, STEADY: tl.constexpr,
):  # fmt: skip
    """One tile of rows and PACK query heads. `scale` includes log2(e); RUN is the longest run of whole tiles.

    Keys left of where all rows have saturated are taken FAR_N, a multiple of BLOCK_N, at a time; STEADY: see cope_far.

    `entries` is scratch, float32 [programs, PAD_P + 2, BLOCK_M]: the position logits (base 2) of each program's rows.
    """
    TILE_ROWS: tl.constexpr = BLOCK_M // PACK
    LAST: tl.constexpr = P_MAX - 1
    first_head = tl.program_id(0) * PACK
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest rows first: short ones fill the gaps at the end
    # Request i owns the tiles from cu_rows[i] // TILE_ROWS + i on: an upper bound that needs no host sync.
    request = 0
    behind = requests
    while behind - request > 1:
        middle = (request + behind) // 2
        if tl.load(cu_rows + middle) // TILE_ROWS + middle <= tile:
            request = middle
        else:
            behind = middle
    begin = tl.load(cu_rows + request)
    end = tl.load(cu_rows + request + 1)
    first_row = begin + (tile - begin // TILE_ROWS - request) * TILE_ROWS
    if first_row >= end:
        return
    lane = tl.arange(0, BLOCK_M)
    row = tl.minimum(first_row + lane // PACK, end - 1)  # lanes beyond the request repeat its last row, store nothing
    live = (first_row + lane // PACK < end) & (lane < TILE_ROWS * PACK)
    head = first_head + lane % PACK
    q_rows = tl.load(rows + row)
    lowest = tl.load(rows + first_row)
    limit = tl.load(rows + tl.minimum(first_row + TILE_ROWS, end) - 1) + 1

    d = tl.arange(0, PAD_DIM)
    wide = (d < HEAD_DIM)[None, :]
    row64 = row.to(tl.int64)
    queries = load(q + row64[:, None] * q_row + head[:, None] * q_head + d[None, :], wide, PAD_DIM > HEAD_DIM)
    entries += program.to(tl.int64) * ((PAD_P + 2) * BLOCK_M)
    p = tl.arange(0, PAD_P)
    embedded = tl.load(embedding + p[:, None] * e_row + d[None, :], mask=wide & (p < P_MAX)[:, None], other=0.0)
    logits = tl.dot(queries, tl.trans(embedded), input_precision=PRECISION) * 1.4426950408889634
    tl.store(entries + p[None, :] * BLOCK_M + lane[:, None], logits)
    tl.store(entries + PAD_P * BLOCK_M + lane, tl.zeros([BLOCK_M], tl.float32))
    tl.debug_barrier()  # other threads of this program read the stored entries

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, PAD_DIM], tl.float32)
    carry = tl.zeros([BLOCK_M], tl.float32)
    base = tl.full([BLOCK_M], NEVER, tl.float32)
    level = tl.zeros([BLOCK_M], tl.float32)
    slope = tl.zeros([BLOCK_M], tl.float32)
    kink1 = tl.zeros([BLOCK_M], tl.float32)
    kink2 = tl.zeros([BLOCK_M], tl.float32)
    ceiling = tl.full([BLOCK_M], LAST, tl.float32)
    ones = triangle(BLOCK_N, GATE)
    kv_head_at = (first_head // GROUP).to(tl.int64) * kv_head
    k += kv_head_at
    v += kv_head_at
    table += request.to(tl.int64) * table_row

    stop = limit
    free = tl.minimum((lowest + 1) // BLOCK_N * BLOCK_N, limit)  # keys below need no mask
    run = 2
    done = False
    if SLOTS:
        by_offset = tl.load(canonical + row) != 0
        slot_begin = tl.load(cu_slots + request)
        slot = tl.load(cu_slots + request + 1) - 1
        ahead = slot >= slot_begin
        while ahead:  # slots behind the tile's last row
            skip = tl.load(slot_bounds + 2 * slot) >= limit
            slot = tl.where(skip, slot - 1, slot)
            ahead = skip & (slot >= slot_begin)
        inside = False
        # The sums at which a slot is entered are kept in memory: as loop-carried values they break the compiler.
        entered = entries + (PAD_P + 1) * BLOCK_M
        tl.store(entered + lane, carry)
        tl.debug_barrier()
    while (stop > 0) & ((not done) | (stop % BLOCK_N != 0) | (stop > free)):
        edge = 0  # the next row at which a slot begins or ends
        if SLOTS:
            known = slot >= slot_begin
            at_slot = tl.maximum(slot, 0)
            slot_first = tl.where(known, tl.load(slot_bounds + 2 * at_slot), 0)
            slot_end = tl.where(known, tl.load(slot_bounds + 2 * at_slot + 1), 0)
            jump = tl.load(slot_offsets + at_slot * heads + head)
            entry = fetch(entered, lane, ASM)
            inside = inside | (stop <= slot_end)
            passed = by_offset & (q_rows >= slot_end)
            edge = tl.where(inside, slot_first, slot_end)
            if CAPPED:
                ceiling = tl.where(inside & passed, tl.minimum(entry + jump, LAST), LAST)
        if (stop > free) | (stop % BLOCK_N != 0) | (stop - edge < BLOCK_N):
            first = (stop - 1) // BLOCK_N * BLOCK_N
            low = tl.maximum(first, edge)
            blocks = block_ids(table, first, limit, BLOCK_SIZE, BLOCK_N)
            offsets = key_offsets(blocks, first, limit, kv_block, kv_slot, BLOCK_SIZE, BLOCK_N, True)
            acc, top, total, carry, base, level, slope, kink1, kink2 = gated_tile(
                acc, top, total, carry, base, level, slope, kink1, kink2, ceiling,
                queries, q_rows, lane, entries, ones, k, v, offsets, first, low, stop, scale,
                HEAD_DIM, PAD_DIM, BLOCK_M, BLOCK_N, LAST, True, CAPPED, PRECISION, ASM,
            )  # fmt: skip
            stop = low
        else:
            count = tl.minimum((stop - edge) // BLOCK_N, run)
            # Block ids are loaded one tile ahead: dependent loads do not pipeline well.
            blocks = block_ids(table, stop - BLOCK_N, limit, BLOCK_SIZE, BLOCK_N)
            for i in tl.range(0, count, num_stages=STAGES):
                first = stop - (i + 1) * BLOCK_N
                offsets = key_offsets(blocks, first, limit, kv_block, kv_slot, BLOCK_SIZE, BLOCK_N, False)
                blocks = block_ids(table, first - BLOCK_N, limit, BLOCK_SIZE, BLOCK_N)
                acc, top, total, carry, base, level, slope, kink1, kink2 = gated_tile(
                    acc, top, total, carry, base, level, slope, kink1, kink2, ceiling,
                    queries, q_rows, lane, entries, ones, k, v, offsets, first, 0, stop, scale,
                    HEAD_DIM, PAD_DIM, BLOCK_M, BLOCK_N, LAST, False, CAPPED, PRECISION, ASM,
                )  # fmt: skip
            stop -= count * BLOCK_N
        if SLOTS:
            leaves = inside & (stop == slot_first)
            carry = tl.where(leaves & passed, entry + jump, carry)
            base = tl.where(leaves, NEVER, base)  # sums may have fallen
            slot = tl.where(leaves, slot - 1, slot)
            inside = inside & (not leaves)
            tl.store(entered + lane, carry, mask=(lane >= 0) & (not inside))
            tl.debug_barrier()
        least = tl.min(carry, 0)
        done = least >= LAST
        if SLOTS:
            done = done & (not inside)  # left of the slot a row's sum may be lower than inside it
        # As many whole tiles as the slowest row needs at its rate so far.
        wanted = (LAST - least) / tl.maximum(least, 1e-3) * (lowest + 1 - stop).to(tl.float32) * (1.0 / BLOCK_N)
        run = tl.maximum(tl.minimum(wanted, RUN - 1.0), 0.0).to(tl.int32) + 1

    heavy = lane < 0
    if stop > 0:
        constant = tl.load(entries + LAST * BLOCK_M + lane)
        acc, top, total = far_tiles(
            acc, top - constant, total, queries, k, v, table, stop, limit, scale, kv_block, kv_slot,
            BLOCK_SIZE, HEAD_DIM, PAD_DIM, BLOCK_M, BLOCK_N, FAR_N, STEADY, PRECISION, FAR_STAGES,
        )  # fmt: skip
        top += constant
        if STEADY:
            heavy = total > TOO_MUCH
    at = out + row64[:, None] * out_row + head[:, None] * out_head + d[None, :]
    if LSE:
        tl.store(lse + row64 * lse_row + head, top + tl.log2(total), mask=live & ~heavy)
    tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask=(live & ~heavy)[:, None] & wide)
    if STEADY and tl.max(heavy.to(tl.int32), 0) > 0:
        # Beside far keys of such weight the near ones vanish in float32: these rows are computed from the far ones
        # alone.
        acc, top, total = far_tiles(
            tl.zeros([BLOCK_M, PAD_DIM], tl.float32), tl.full([BLOCK_M], float("-inf"), tl.float32),
            tl.zeros([BLOCK_M], tl.float32), queries, k, v, table, stop, limit, scale, kv_block, kv_slot,
            BLOCK_SIZE, HEAD_DIM, PAD_DIM, BLOCK_M, BLOCK_N, BLOCK_N, False, PRECISION, 2,
        )  # fmt: skip
        top += tl.load(entries + LAST * BLOCK_M + lane)
        if LSE:
            tl.store(lse + row64 * lse_row + head, top + tl.log2(total), mask=live & heavy)
        tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask=(live & heavy)[:, None] & wide)
