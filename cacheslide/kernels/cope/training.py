"""Differentiable causal CoPE attention over whole sequences: fused kernels on CUDA, plain PyTorch elsewhere."""

import torch
from torch import Tensor

from cacheslide.positions import cope


def cope_attention(q: Tensor, k: Tensor, v: Tensor, embedding: Tensor, scale: float | None = None) -> Tensor:
    """Causal CoPE attention with gradients for all four tensors.

    Parameters
    ----------
    q : Tensor [batch, heads, length, head_dim]
    k, v : Tensor [batch, kv_heads, keys, head_dim]
        Not rotated. With more keys than queries the queries are the last rows (decoding; no gradients on CUDA then).
        Sequences may be padded on the right: no row attends to later ones.
    embedding : Tensor [p_max, head_dim], of q's dtype
    scale : float, optional
        1 / sqrt(head_dim) by default.

    Returns
    -------
    Tensor [batch, heads, length, head_dim], of q's dtype

    Notes
    -----
    Memory is linear in the length in both directions. On CUDA gradients of k and v are summed with atomics, so their
    last bits vary from run to run.
    """
    if not q.dtype == k.dtype == v.dtype == embedding.dtype:
        raise ValueError(f"q {q.dtype}, k {k.dtype}, v {v.dtype} and the position table {embedding.dtype} must agree")
    if k.shape != v.shape or q.shape[1] % k.shape[1] or q.shape[3] != k.shape[3] or q.shape[2] > k.shape[2]:
        raise ValueError(f"queries {tuple(q.shape)} do not fit keys {tuple(k.shape)} and values {tuple(v.shape)}")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if q.is_cuda:
        return Fused.apply(q, k, v, embedding, scale)
    rows = torch.arange(k.shape[2] - q.shape[2], k.shape[2])
    out = [
        cope.cope_attention(a.transpose(0, 1), b.transpose(0, 1), c.transpose(0, 1), embedding, rows, scale)
        for a, b, c in zip(q, k, v, strict=True)
    ]
    return torch.stack(out).transpose(1, 2)


class Fused(torch.autograd.Function):
    """The Triton kernels behind autograd; `cope_attention` checks its arguments."""

    @staticmethod
    def forward(ctx, q, k, v, embedding, scale):
        """Save outputs and the rows' softmax sums; the backward pass recomputes gates."""
        from cacheslide.kernels.cope import training_launch as launch

        q, k, v, embedding = launch.aligned(q, k, v, embedding)
        out, lse = launch.forward(q, k, v, embedding, scale)
        ctx.save_for_backward(q, k, v, embedding, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, do):
        """Gradients of q, k, v and the position table."""
        from cacheslide.kernels.cope import training_launch as launch

        q, k, v, embedding, out, lse = ctx.saved_tensors
        return *launch.backward(q, k, v, embedding, out, lse, do, ctx.scale), None
