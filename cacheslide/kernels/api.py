"""The kernels over a paged KV cache: the interface for callers.

A cache `kv` is vLLM's view [blocks, kv_heads, block_size, 2 * head_dim]: any strides, but the last dimension is
contiguous and holds the key beside the value. A slot is block * block_size + offset.
"""

from cacheslide.kernels.placement.api import cache_pointers, place_layers, row_deviation
from cacheslide.kernels.row_attention.api import RowAttention, row_attention

__all__ = ["RowAttention", "cache_pointers", "place_layers", "row_attention", "row_deviation"]
