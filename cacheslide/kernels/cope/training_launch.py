"""Launches of the CoPE kernels over whole sequences [batch, heads, length, head_dim], forward and backward."""

import torch
import triton
from torch import Tensor

from cacheslide.kernels.cope.backward import _cope_backward
from cacheslide.kernels.cope.launch import _ASM, _GATE, Blocks, CopeTiling, cope_attention

_ONE_BLOCK = 1 << 30  # a sequence of any length is one block: no recompilation


class _Sequences(Blocks):
    """Keys and values [batch, kv_heads, keys, head_dim] as one block a sequence."""

    @property
    def block_size(self) -> int:
        return _ONE_BLOCK


def aligned(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with a contiguous last dimension; k and v (second and third) with equal strides."""
    out = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
    if out[1].stride() != out[2].stride():
        out[1], out[2] = out[1].contiguous(), out[2].contiguous()
    return tuple(out)


def forward(
    q: Tensor, k: Tensor, v: Tensor, embedding: Tensor, scale: float, tiling: CopeTiling | None = None
) -> tuple[Tensor, Tensor]:
    """Output [batch, heads, length, head_dim] and log2 of each row's softmax sum, float32 [batch, heads, length]."""
    batch, heads, length, dim = q.shape
    keys = k.shape[2]
    rows = torch.arange(keys - length, keys, dtype=torch.int32, device=q.device).repeat(batch)
    bounds = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * length
    table = torch.arange(batch, dtype=torch.int32, device=q.device)[:, None]
    packed = q.transpose(1, 2).reshape(batch * length, heads, dim)
    out = torch.empty(batch * length, heads, dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch * length, heads, dtype=torch.float32, device=q.device)
    blocks = _Sequences(k, v, table)
    cope_attention(packed, rows, bounds, blocks, embedding, scale, out, keys - 1, lse=lse, tiling=tiling)
    shaped = out.view(batch, length, heads, dim).transpose(1, 2)
    return shaped, lse.view(batch, length, heads).transpose(1, 2).contiguous()


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    embedding: Tensor,
    out: Tensor,
    lse: Tensor,
    do: Tensor,
    scale: float,
    block_m: int | None = None,
    block_n: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the position table, in their dtypes; sums over rows and keys are float32."""
    batch, heads, length, dim = q.shape
    if k.shape[2] != length:
        raise ValueError(f"gradients need as many keys as queries, not {k.shape[2]} and {length}")
    do = do if do.stride(-1) == 1 else do.contiguous()
    delta = (do.float() * out.float()).sum(-1)
    kv_heads, p_max = k.shape[1], embedding.shape[0]
    exact = q.dtype == torch.float32
    block_m = block_m or (32 if exact or dim > 128 else 64)
    block_n = block_n or 32
    padded_p = max(16, triton.next_power_of_2(p_max))
    grid = (heads, batch, triton.cdiv(length, block_m))

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    entries = empty(heads * batch * grid[2], padded_p + 1, block_m)
    dq, dk, dv = empty(batch, heads, length, dim), empty(*k.shape).zero_(), empty(*k.shape).zero_()
    dz = empty(batch, heads, length, padded_p).zero_()
    _cope_backward[grid](
        q, k, v, embedding, do, lse, delta, entries, dq, dk, dv, dz, length, scale,
        *q.stride()[:3], *k.stride()[:3], *do.stride()[:3], *dk.stride()[:3], embedding.stride(0),
        GROUP=heads // kv_heads, HEAD_DIM=dim, PAD_DIM=max(16, triton.next_power_of_2(dim)), P_MAX=p_max,
        PAD_P=padded_p, BLOCK_M=block_m, BLOCK_N=block_n, GATE=_GATE[q.dtype],
        PRECISION="ieee" if exact else "tf32", ASM=_ASM, num_warps=4, num_stages=2,
    )  # fmt: skip
    dz = dz[..., :p_max]
    dq = dq + dz @ embedding.float()
    de = torch.einsum("bhtm,bhtd->md", dz, q.float())
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), de.to(embedding.dtype)
