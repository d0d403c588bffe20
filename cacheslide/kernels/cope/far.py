"""Triton pieces of CoPE attention: keys beyond the point where all rows of a tile have saturated.

Each row adds one constant to their scores, so this is plain attention. Most keys of a long prompt are of this kind.

With STEADY the softmax's reference stays the near keys' maximum. In float32 sums, with weights of the same exponent
range (float32, bfloat16), any reference is exact enough; weights overflow only above 2^127 times the near keys'
largest. That saves every tile the search for its maximum and the rescaling of its output. A sum above TOO_MUCH means
that a row must be recomputed without STEADY.
"""

import triton
import triton.language as tl

from cacheslide.kernels.cope.tiles import block_ids, key_offsets, load

# Far below overflow, and so far above the near keys' part (less than 2^31) that float32 cannot represent it.
TOO_MUCH = tl.constexpr(2.0**100)


@triton.jit
def _far_tile(
    acc, top, total, q, k, v, offsets, scale,
    HEAD_DIM: tl.constexpr, PAD_DIM: tl.constexpr, STEADY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over a tile of keys visible to all rows. With STEADY `total` is [rows, keys], not yet summed."""
    d = tl.arange(0, PAD_DIM)
    wide = (d < HEAD_DIM)[None, :]
    keys = load(k + offsets[:, None] + d[None, :], wide, PAD_DIM > HEAD_DIM)
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    if STEADY:
        weights = tl.exp2(scores * scale - top[:, None])
        total += weights
    else:
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(top - higher)
        acc *= shrink[:, None]
        total = total * shrink + tl.sum(weights, 1)
        top = higher
    values = load(v + offsets[:, None] + d[None, :], wide, PAD_DIM > HEAD_DIM)
    acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
    return acc, top, total


@triton.jit
def far_tiles(
    acc, top, total, q, k, v, table, stop, limit, scale, kv_block, kv_slot,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, PAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, FAR_N: tl.constexpr, STEADY: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add keys 0..stop, a multiple of BLOCK_N, to `acc` [rows, PAD_DIM], `top` and `total` [rows].

    `top` is the maximum (base 2) minus the rows' constant. Keys are taken FAR_N, a multiple of BLOCK_N, at a time.
    """
    while stop % FAR_N != 0:
        stop -= BLOCK_N
        blocks = block_ids(table, stop, limit, BLOCK_SIZE, BLOCK_N)
        offsets = key_offsets(blocks, stop, limit, kv_block, kv_slot, BLOCK_SIZE, BLOCK_N, False)
        acc, top, total = _far_tile(acc, top, total, q, k, v, offsets, scale, HEAD_DIM, PAD_DIM, False, PRECISION)
    sums = total
    if STEADY:
        sums = tl.zeros([BLOCK_M, FAR_N], tl.float32)
    # Block ids are loaded one tile ahead: dependent loads do not pipeline well.
    blocks = block_ids(table, stop - FAR_N, limit, BLOCK_SIZE, FAR_N)
    for i in tl.range(0, stop // FAR_N, num_stages=STAGES):
        first = stop - (i + 1) * FAR_N
        offsets = key_offsets(blocks, first, limit, kv_block, kv_slot, BLOCK_SIZE, FAR_N, False)
        blocks = block_ids(table, first - FAR_N, limit, BLOCK_SIZE, FAR_N)
        acc, top, sums = _far_tile(acc, top, sums, q, k, v, offsets, scale, HEAD_DIM, PAD_DIM, STEADY, PRECISION)
    if STEADY:
        sums = total + tl.sum(sums, 1)
    return acc, top, sums
