"""Kernel calls on fixed inputs: output bits of the plain-PyTorch kernels."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from cacheslide.kernels import api as kernels
from cacheslide.kernels.cope import api as cope
from cacheslide.positions.rope import Rotary, inverse_frequencies

# heads, KV heads, head size, block size, rows of each request's context, query rows of each request
SHAPES = [(4, 2, 16, 16, (37, 5), (9, 5)), (7, 1, 10, 32, (64, 33, 1), (1, 33, 1)), (3, 3, 8, 16, (90,), (17,))]


def _bits(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(torch.nan_to_num(tensor, nan=-7.0).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _cache(kv_heads: int, dim: int, block: int, lengths: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """A cache whose unused rows hold NaN, and the requests' block table."""
    g = torch.Generator().manual_seed(seed)
    need = [-(-n // block) for n in lengths]
    order, at = torch.randperm(sum(need) + 2, generator=g), 0
    table = torch.zeros(len(lengths), max(need), dtype=torch.int32)
    kv = torch.full((sum(need) + 2, kv_heads, block, 2 * dim), float("nan"))
    for i, (n, blocks) in enumerate(zip(lengths, need, strict=True)):
        table[i, :blocks] = order[at : at + blocks]
        for row in range(n):
            kv[table[i, row // block].long(), :, row % block] = torch.randn(kv_heads, 2 * dim, generator=g)
        at += blocks
    return kv, table


def run() -> dict[str, Any]:
    """Bits by kernel and shape."""
    out = {}
    for number, (heads, kv_heads, dim, block, lengths, asked) in enumerate(SHAPES):
        g = torch.Generator().manual_seed(number)
        kv, table = _cache(kv_heads, dim, block, lengths, number)
        rows = [torch.randperm(n, generator=g)[:m].sort().values for n, m in zip(lengths, asked, strict=True)]
        q = torch.randn(sum(asked), heads, dim, generator=g)
        cu_rows = torch.tensor([0, *asked]).cumsum(0).int()
        packed = torch.cat(rows).int()
        out[f"row_attention/{number}"] = {"bits": _bits(kernels.row_attention(q, packed, cu_rows, table, kv))}
        embedding = torch.randn(9, dim, generator=g)
        given = q, packed, cu_rows, table, kv, embedding
        out[f"cope_attention/{number}"] = {"bits": _bits(cope.cope_attention(*given))}
        out[f"placement/{number}"] = {"bits": _placed(kv, dim, block, g)}
    return out


def _placed(kv: Tensor, dim: int, block: int, g: torch.Generator) -> str:
    rotary, caches = Rotary(inverse_frequencies(dim, 1e4), 128), [kv.clone(), kv.clone()]
    k, v = (torch.randn(2, 11, kv.shape[1], dim, generator=g) for _ in "kv")
    slots = torch.randperm(len(kv) * block, generator=g)[:11]
    slots[3] = -1
    deltas = torch.arange(-5, 6, dtype=torch.int32)
    kernels.place_layers(k, v, slots, deltas, caches, rotary)
    return _bits(*caches, kernels.row_deviation(k[0], v[0], deltas, rotary))
