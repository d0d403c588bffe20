"""Choice of the executor's attention by the cache's layout and by attributes of vLLM's layers."""

from collections.abc import Sequence

from cacheslide.vllm.worker.attention import PagedAttention, RowKernel, gathered
from cacheslide.vllm.worker.cope_rows import CopeRows
from cacheslide.vllm.worker.kv_layout import PagedLayer


def choose(paged: Sequence[PagedLayer]) -> PagedAttention:
    """The attention for these layers' caches."""
    if paged[0].packed:
        return gathered
    if not hasattr(paged[0].attention, "cope_positions"):
        return RowKernel()
    layers = [p.attention for p in paged]
    return CopeRows([layer.cope_positions for layer in layers], layers[0].cope_offsets)
