"""The KV buffer of the reference host: two plain tensors."""

import torch
from torch import Tensor

from cacheslide.positions.ccpe import PromptSlots


class DenseKV:
    """A request's KV as two tensors [layers, capacity, kv_heads, head_dim]; unwritten rows hold NaN.

    Parameters
    ----------
    sizes : DecoderConfig or ModelAdapter
        Object with `num_layers`, `num_kv_heads` and `head_dim`.
    """

    def __init__(self, sizes, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        shape = (sizes.num_layers, capacity, sizes.num_kv_heads, sizes.head_dim)
        self.k = torch.full(shape, float("nan"), dtype=dtype, device=device)
        self.v = torch.full(shape, float("nan"), dtype=dtype, device=device)
        self.slots: PromptSlots | None = None  # a CoPE model's updated slots in the prompt

    @property
    def capacity(self) -> int:
        """Number of rows."""
        return self.k.shape[1]

    def write(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """See `KVBuffer.write`."""
        self.k[layer].index_copy_(0, rows, k.to(self.k.dtype))
        self.v[layer].index_copy_(0, rows, v.to(self.v.dtype))

    def read(self, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `KVBuffer.read`."""
        return self.k[layer].index_select(0, rows), self.v[layer].index_select(0, rows)
