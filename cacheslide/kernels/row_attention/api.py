"""Attention of scattered query rows over a paged KV cache: Triton on CUDA, plain PyTorch elsewhere.

A cache `kv` is vLLM's view [blocks, kv_heads, block_size, 2 * head_dim]: any strides, but the last dimension is
contiguous and holds the key beside the value. A slot is block * block_size + offset.
"""

from collections.abc import Callable

from torch import Tensor

from cacheslide.kernels.row_attention import reference


def row_attention(
    q: Tensor,
    rows: Tensor,
    cu_rows: Tensor,
    block_table: Tensor,
    kv: Tensor,
    scale: float | None = None,
    out: Tensor | None = None,
    max_row: int | None = None,
) -> Tensor:
    """Causal attention of scattered query rows of several requests over their paged KV.

    Parameters
    ----------
    q : Tensor [n, heads, head_dim]
        Queries of all requests, concatenated; float32, bfloat16 or float16, like `kv`.
    rows : Tensor [n], int32
        Each query's row in its request, ascending inside a request; it attends to keys 0..row of that request.
    cu_rows : Tensor [requests + 1], int32
        Request i owns queries cu_rows[i]..cu_rows[i + 1]; a request may own none.
    block_table : Tensor [requests, max_blocks], int32
        Blocks of each request's keys, in order. Entries behind its last row are not read.
    kv : Tensor [blocks, kv_heads, block_size, 2 * head_dim]
        Every key up to a request's last query row must have been written; other slots may hold NaN.
    scale : float, optional
        Factor on the scores, above 0; 1 / sqrt(head_dim) by default.
    out : Tensor [n, heads, head_dim], optional
    max_row : int, optional
        The largest row, if known on the host: gives a better tiling than the bound from the table's width.

    Returns
    -------
    Tensor [n, heads, head_dim], of q's dtype
    """
    return RowAttention(rows, cu_rows, block_table, scale, max_row)(q, kv, out)


class RowAttention:
    """`row_attention` of one set of rows in every layer: checks and arguments common to layers are made once.

    Parameters
    ----------
    rows, cu_rows, block_table, scale, max_row
        See `row_attention`. Their numbers may change between calls; `max_row` is then an upper bound. Queries behind
        the last of `cu_rows` are not computed, and their outputs are undefined.
    """

    def __init__(
        self,
        rows: Tensor,
        cu_rows: Tensor,
        block_table: Tensor,
        scale: float | None = None,
        max_row: int | None = None,
    ) -> None:
        if scale is not None and scale <= 0:
            raise ValueError(f"scale must be above 0, not {scale}")
        self.shared, self.scale, self.max_row = (rows, cu_rows, block_table), scale, max_row
        self._form: tuple | None = None  # the tensors' shapes, strides and dtypes in the previous call
        self._launch = None

    def __call__(self, q: Tensor, kv: Tensor, out: Tensor | None = None) -> Tensor:
        """Attention of `q` [n, heads, head_dim] over one layer's cache `kv`."""
        form = q.shape, q.stride(), q.dtype, kv.shape, kv.stride(), kv.dtype, None if out is None else out.stride()
        if form != self._form:
            _check(q, kv, out)
            self._launch, self._form = self._bind(q, kv, out), form
        return self._launch(q, kv, out)

    def _bind(self, q: Tensor, kv: Tensor, out: Tensor | None) -> Callable[..., Tensor]:
        rows, cu_rows, block_table = self.shared
        if not q.is_cuda:
            return lambda q, kv, out: reference.row_attention(q, rows, cu_rows, block_table, kv, self.scale, out)
        from cacheslide.kernels.row_attention import launch

        return launch.RowLaunch(q, rows, cu_rows, block_table, kv, self.scale, out, self.max_row)


def _check(q: Tensor, kv: Tensor, out: Tensor | None) -> None:
    if q.dtype != kv.dtype:
        raise ValueError(f"queries are {q.dtype} but the cache holds {kv.dtype}")
    if q.shape[2] * 2 != kv.shape[3] or q.shape[1] % kv.shape[1]:
        raise ValueError(f"queries {tuple(q.shape)} do not fit a cache {tuple(kv.shape)}")
    if q.stride(2) != 1 or kv.stride(3) != 1 or (out is not None and out.stride(2) != 1):
        raise ValueError("the last dimension of queries, cache and output must be contiguous")
