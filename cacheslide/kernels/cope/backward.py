"""Triton kernel: gradients of causal CoPE attention; gates are recomputed, O(queries × keys) memory is not needed.

With x the scores incl. their entries, A the weights, p the positions: dx_ij = A_ij (do_i·v_j - delta_i); a gate's
gradient is dg_ik = sum of dp_ij for j <= k, where dp_ij = dx_ij times the entries' slope at p_ij. Gates are summed from
the right, dp from the left: a first pass over the unsaturated keys sums each row's dp, and a second one, from right to
left, subtracts from that total. Gradients of keys and values are added atomically: their last bits depend on the order
in which programs run.
"""

import triton
import triton.language as tl

from cacheslide.kernels.cope.tiles import fetch, gates_of, load, triangle


@triton.jit
def _tile(
    q, do, lse, delta, carry, live, q_rows, lane, entries, ones, k, v, first, stop, scale, kv_row,
    HEAD_DIM: tl.constexpr, PAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LAST: tl.constexpr,
    PRECISION: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Keys first..first+BLOCK_N below `stop`: keys, gates, positions, weights, dx, dp, and the rows' gate sums."""
    d = tl.arange(0, PAD_DIM)
    at = first + tl.arange(0, BLOCK_N)
    valid = (d < HEAD_DIM)[None, :] & (at < stop)[:, None]
    offsets = at.to(tl.int64)[:, None] * kv_row + d[None, :]
    keys = tl.load(k + offsets, mask=valid, other=0.0)
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
    seen = (at[None, :] <= q_rows[:, None]) & live[:, None]
    gates = tl.where(seen, gates_of(scores), 0.0)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) + carry[:, None]
    position = tl.dot(gates.to(ones.dtype), ones, sums, input_precision=PRECISION)
    carry = tl.max(position, 1)
    bounded = tl.minimum(position, LAST)
    low = bounded.to(tl.int32)
    index = low * BLOCK_M + lane[:, None]
    below = fetch(entries, index, ASM)
    slope = tl.where(position < LAST, fetch(entries + BLOCK_M, index, ASM) - below, 0.0)
    scores += below + (bounded - low.to(tl.float32)) * slope
    weights = tl.where(seen, tl.exp2(scores - lse[:, None]), 0.0)
    values = tl.load(v + offsets, mask=valid, other=0.0)
    dx = weights * (tl.dot(do, tl.trans(values), input_precision=PRECISION) - delta[:, None])
    dp = dx * slope * 0.6931471805599453  # the entries are base 2
    return keys, gates, bounded, weights, dx, dp, carry


@triton.jit
def _add_gradients(
    acc, ds, weights, q, do, keys, dk, dv, first, stop, scale, dkv_row,
    HEAD_DIM: tl.constexpr, PAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add dq of the rows to `acc`, and dk and dv of the keys to memory."""
    d = tl.arange(0, PAD_DIM)
    at = first + tl.arange(0, BLOCK_N)
    valid = (d < HEAD_DIM)[None, :] & (at < stop)[:, None]
    offsets = at.to(tl.int64)[:, None] * dkv_row + d[None, :]
    ds = (ds * scale).to(q.dtype)
    acc = tl.dot(ds, keys, acc, input_precision=PRECISION)
    tl.atomic_add(dk + offsets, tl.dot(tl.trans(ds), q, input_precision=PRECISION), mask=valid, sem="relaxed")
    weighted = tl.dot(tl.trans(weights.to(do.dtype)), do, input_precision=PRECISION)
    tl.atomic_add(dv + offsets, weighted, mask=valid, sem="relaxed")
    return acc


@triton.jit
def _cope_backward(
    q, k, v, embedding, do, lse, delta, entries, dq, dk, dv, dz, length, scale,
    q_batch, q_head, q_row, kv_batch, kv_head, kv_row, do_batch, do_head, do_row, dkv_batch, dkv_head, dkv_row, e_row,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAD_DIM: tl.constexpr, P_MAX: tl.constexpr, PAD_P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one head and sequence. `scale` is the scores' factor.

    lse, delta, dq (float32), dz are [batch, heads, length (, width)] and contiguous; dq lacks the entries' part, which
    is dz @ embedding. `entries` is scratch, float32 [programs, PAD_P + 1, BLOCK_M].
    """
    LAST: tl.constexpr = P_MAX - 1
    tile = tl.num_programs(2) - 1 - tl.program_id(2)
    head, batch = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(0)
    sequence = (batch * heads + head).to(tl.int64)
    lane, d, p = tl.arange(0, BLOCK_M), tl.arange(0, PAD_DIM), tl.arange(0, PAD_P)
    row = tile * BLOCK_M + lane
    live = row < length
    wide = (d < HEAD_DIM)[None, :]
    valid = live[:, None] & wide
    q += batch.to(tl.int64) * q_batch + head * q_head
    do += batch.to(tl.int64) * do_batch + head * do_head
    queries = tl.load(q + row.to(tl.int64)[:, None] * q_row + d[None, :], mask=valid, other=0.0)
    errors = tl.load(do + row.to(tl.int64)[:, None] * do_row + d[None, :], mask=valid, other=0.0)
    sums = tl.load(lse + sequence * length + row, mask=live, other=0.0)
    deltas = tl.load(delta + sequence * length + row, mask=live, other=0.0)
    entries += (sequence * tl.num_programs(2) + tile) * ((PAD_P + 1) * BLOCK_M)
    embedded = tl.load(embedding + p[:, None] * e_row + d[None, :], mask=wide & (p < P_MAX)[:, None], other=0.0)
    logits = tl.dot(queries, tl.trans(embedded), input_precision=PRECISION) * 1.4426950408889634
    tl.store(entries + p[None, :] * BLOCK_M + lane[:, None], logits)
    tl.store(entries + PAD_P * BLOCK_M + lane, tl.zeros([BLOCK_M], tl.float32))
    tl.debug_barrier()  # other threads of this program read the stored entries

    k += batch.to(tl.int64) * kv_batch + (head // GROUP) * kv_head
    v += batch.to(tl.int64) * kv_batch + (head // GROUP) * kv_head
    dk += batch.to(tl.int64) * dkv_batch + (head // GROUP) * dkv_head
    dv += batch.to(tl.int64) * dkv_batch + (head // GROUP) * dkv_head
    dz += sequence * length * PAD_P
    ones = triangle(BLOCK_N, GATE)
    base2 = scale * 1.4426950408889634
    end = tl.minimum((tile + 1) * BLOCK_M, length)

    left = tl.zeros([BLOCK_M], tl.float32)  # remainder of each row's total of dp
    carry = tl.zeros([BLOCK_M], tl.float32)
    tiles = (end - 1) // BLOCK_N + 1
    least = tl.min(carry, 0)
    for i in range(0, tiles):
        if least < LAST:
            first = (tiles - 1 - i) * BLOCK_N
            _, _, _, _, _, dp, carry = _tile(
                queries, errors, sums, deltas, carry, live, row, lane, entries, ones, k, v, first, end, base2, kv_row,
                HEAD_DIM, PAD_DIM, BLOCK_M, BLOCK_N, LAST, PRECISION, ASM,
            )  # fmt: skip
            left += tl.sum(dp, 1)
            least = tl.min(tl.where(live, carry, LAST), 0)

    acc = tl.zeros([BLOCK_M, PAD_DIM], tl.float32)
    ahead = tl.trans(triangle(BLOCK_N, tl.float32))
    carry = tl.zeros([BLOCK_M], tl.float32)
    least = tl.min(carry, 0)
    done = 0
    for i in range(0, tiles):
        if least < LAST:
            first = (tiles - 1 - i) * BLOCK_N
            keys, gates, position, weights, dx, dp, carry = _tile(
                queries, errors, sums, deltas, carry, live, row, lane, entries, ones, k, v, first, end, base2, kv_row,
                HEAD_DIM, PAD_DIM, BLOCK_M, BLOCK_N, LAST, PRECISION, ASM,
            )  # fmt: skip
            left -= tl.sum(dp, 1)
            dg = tl.dot(dp, ahead, input_precision=PRECISION) + left[:, None]
            ds = dx + dg * gates * (1.0 - gates)
            acc = _add_gradients(
                acc, ds, weights, queries, errors, keys, dk, dv, first, end, scale, dkv_row,
                HEAD_DIM, PAD_DIM, BLOCK_N, PRECISION,
            )  # fmt: skip
            highest = tl.minimum(tl.max(carry, 0), LAST)
            for m in range(least.to(tl.int32), tl.minimum(highest.to(tl.int32) + 2, P_MAX)):
                near = tl.maximum(1.0 - tl.abs(position - m), 0.0)
                tl.atomic_add(dz + row.to(tl.int64) * PAD_P + m, tl.sum(dx * near, 1), mask=live, sem="relaxed")
            least = tl.min(tl.where(live, carry, LAST), 0)
            done += 1

    first = (tiles - 1 - done) * BLOCK_N
    constant = tl.load(entries + LAST * BLOCK_M + lane) - sums
    last = tl.zeros([BLOCK_M], tl.float32)
    for i in range(0, first // BLOCK_N + 1):  # saturated: gradients of plain attention
        start = first - i * BLOCK_N
        at = start + tl.arange(0, BLOCK_N)
        offsets = at.to(tl.int64)[:, None] * kv_row + d[None, :]
        keys = load(k + offsets, wide, PAD_DIM > HEAD_DIM)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * base2 + constant[:, None]
        weights = tl.where(live[:, None], tl.exp2(scores), 0.0)
        values = load(v + offsets, wide, PAD_DIM > HEAD_DIM)
        dx = weights * (tl.dot(errors, tl.trans(values), input_precision=PRECISION) - deltas[:, None])
        last += tl.sum(dx, 1)
        acc = _add_gradients(
            acc, dx, weights, queries, errors, keys, dk, dv, start, end, scale, dkv_row,
            HEAD_DIM, PAD_DIM, BLOCK_N, PRECISION,
        )  # fmt: skip
    tl.atomic_add(dz + row.to(tl.int64) * PAD_P + LAST, last, mask=live, sem="relaxed")
    at = dq + (sequence * length + row)[:, None] * HEAD_DIM + d[None, :]
    tl.store(at, acc, mask=valid)
