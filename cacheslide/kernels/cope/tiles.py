"""Triton pieces of CoPE attention: one tile of queries against one tile of keys.

Keys are taken from right to left. A tile's gates are summed from the right by a product with a triangle of ones on the
tensor cores; `carry` holds each row's sum over the keys already taken. The entry added to a score is piecewise linear
in the position, with a kink at every integer. A tile in which no row passes more than two kinks (small gates) computes
entries from a line and two hinges, whose coefficients are reloaded only when a row leaves their range; other tiles look
entries up.
"""

import triton
import triton.language as tl

NEVER = tl.constexpr(-1e9)  # a base out of reach of every position: forces the coefficients to be loaded


@triton.jit
def load(at, valid, MASKED: tl.constexpr):
    return tl.load(at, mask=valid, other=0.0) if MASKED else tl.load(at)


@triton.jit
def block_ids(table, first, limit, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Block ids of keys first..first+BLOCK_N, clamped to 0..limit: a scalar if one block holds them all."""
    if BLOCK_SIZE % BLOCK_N == 0:
        ids = tl.load(table + tl.maximum(tl.minimum(first, limit - 1), 0) // BLOCK_SIZE)
    else:
        keys = tl.maximum(tl.minimum(first + tl.arange(0, BLOCK_N), limit - 1), 0)
        ids = tl.load(table + keys // BLOCK_SIZE)
    return ids


@triton.jit
def key_offsets(
    blocks, first, limit, kv_block, kv_slot, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr
):
    """Element offsets of keys first..first+BLOCK_N, int64 [BLOCK_N]; keys from `limit` on repeat the last one."""
    inner = tl.arange(0, BLOCK_N)
    if EDGE:
        inside = tl.minimum(first + inner, limit - 1) % BLOCK_SIZE
    elif BLOCK_N % BLOCK_SIZE == 0:
        inside = inner % BLOCK_SIZE  # the same for every tile
    else:
        inside = (first + inner) % BLOCK_SIZE
    return blocks.to(tl.int64) * kv_block + inside.to(tl.int64) * kv_slot


@triton.jit
def gates_of(scores):
    """sigmoid of scores in units of log2(e), as the square of a reciprocal root, which is cheaper than a division."""
    root = tl.rsqrt(1.0 + tl.exp2(-scores))
    return root * root


@triton.jit
def triangle(BLOCK_N: tl.constexpr, DTYPE: tl.constexpr):
    """[BLOCK_N, BLOCK_N], 1 where the first index is at or behind the second: sums from the right."""
    at = tl.arange(0, BLOCK_N)
    return (at[:, None] >= at[None, :]).to(DTYPE)


@triton.jit
def fetch(at, index, ASM: tl.constexpr):
    """float32 values at `at` + index for every index of a tensor, in that tensor's own layout.

    A Triton load would convert addresses and values through shared memory to a layout for neighbouring addresses, and
    the scores with them; these addresses are in no order, so nothing is gained by that.
    """
    if ASM:
        value = tl.inline_asm_elementwise(
            "{ .reg .u64 a; mad.wide.s32 a, $2, 4, $1; ld.global.f32 $0, [a]; }", "=f,l,r",
            [at.to(tl.int64), index], dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        value = tl.load(at + index)
    return value


@triton.jit
def look_up(entries, lane, position, LAST: tl.constexpr, STRIDE: tl.constexpr, ASM: tl.constexpr):
    """Entries at positions [rows, keys], interpolated between two reads; `entries` [LAST + 2, STRIDE], rows `lane`."""
    position = tl.minimum(position, LAST)
    low = position.to(tl.int32)  # positions are not negative
    at = low * STRIDE + lane[:, None]
    below = fetch(entries, at, ASM)
    above = fetch(entries + STRIDE, at, ASM)  # past the last entry any finite value: its weight is 0
    return below + (position - low.to(tl.float32)) * (above - below)


@triton.jit
def hinges(entries, lane, carry, LAST: tl.constexpr, STRIDE: tl.constexpr, ASM: tl.constexpr):
    """Line and two hinges that give the entries at positions floor(carry)..floor(carry) + 3 of each row."""
    base = tl.minimum(tl.floor(carry), LAST)
    at = base.to(tl.int32)
    z0 = fetch(entries, at * STRIDE + lane, ASM)
    z1 = fetch(entries, tl.minimum(at + 1, LAST) * STRIDE + lane, ASM)
    z2 = fetch(entries, tl.minimum(at + 2, LAST) * STRIDE + lane, ASM)
    z3 = fetch(entries, tl.minimum(at + 3, LAST) * STRIDE + lane, ASM)
    slope = z1 - z0
    return base, z0 - base * slope, slope, z2 - 2 * z1 + z0, z3 - 2 * z2 + z1


@triton.jit
def beyond(base, carry, LAST: tl.constexpr):
    """How far the sums are past the rows' bases; a base near the end holds for all larger sums."""
    return tl.max(tl.where(base >= LAST - 2, 0.0, carry - base), 0)


@triton.jit
def gated_tile(
    acc, top, total, carry, base, level, slope, kink1, kink2, ceiling,
    q, q_rows, lane, entries, ones, k, v, offsets, first, low, high, scale,
    HEAD_DIM: tl.constexpr, PAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LAST: tl.constexpr,
    EDGE: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys first..first+BLOCK_N with live gates.

    `acc` [rows, PAD_DIM], `top`, `total` [rows]: running output, maximum (base 2) and sum. `carry` [rows]: gates summed
    so far. `base`..`kink2` [rows]: the hinges' coefficients. `ceiling` [rows]: the largest position. With EDGE
    only keys in low..high at or before the row count.
    """
    d = tl.arange(0, PAD_DIM)
    wide = (d < HEAD_DIM)[None, :]
    keys = load(k + offsets[:, None] + d[None, :], wide, PAD_DIM > HEAD_DIM)
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
    gates = gates_of(scores)
    if EDGE:
        at = first + tl.arange(0, BLOCK_N)
        seen = (at[None, :] <= q_rows[:, None]) & ((at >= low) & (at < high))[None, :]
        gates = tl.where(seen, gates, 0.0)
    before = carry
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) + carry[:, None]
    position = tl.dot(gates.to(ones.dtype), ones, sums, input_precision=PRECISION)
    carry = tl.max(position, 1)  # gates are not negative: the leftmost key has the largest sum
    farthest = carry
    if CAPPED:
        position = tl.minimum(position, ceiling[:, None])
        before = tl.minimum(before, ceiling)
        farthest = tl.minimum(carry, ceiling)
    reach = beyond(base, farthest, LAST)
    if reach > 3.0:
        base, level, slope, kink1, kink2 = hinges(entries, lane, before, LAST, BLOCK_M, ASM)
        reach = beyond(base, farthest, LAST)
    if reach > 3.0:
        bias = look_up(entries, lane, position, LAST, BLOCK_M, ASM)
    else:
        bias = position * slope[:, None] + level[:, None]
        bias += tl.maximum(position - (base + 1)[:, None], 0.0) * kink1[:, None]
        bias += tl.maximum(position - (base + 2)[:, None], 0.0) * kink2[:, None]
    scores += bias
    if EDGE:
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    lower = higher
    if EDGE:
        lower = tl.where(higher == float("-inf"), 0.0, higher)  # a row without a key so far
    weights = tl.exp2(scores - lower[:, None])
    shrink = tl.exp2(top - lower)
    values = load(v + offsets[:, None] + d[None, :], wide, PAD_DIM > HEAD_DIM)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
    total = total * shrink + tl.sum(weights, 1)
    return acc, higher, total, carry, base, level, slope, kink1, kink2
