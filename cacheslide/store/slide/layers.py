"""Layer-wise sources for `overlap.LoadWrite`: chunks read one layer at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cacheslide.store.base import ChunkKV
from cacheslide.store.persistent.filetier import FileTier


class FileLayers:
    """Consecutive chunks in the file tier; a layer's pages are one read per chunk, checksums verified."""

    def __init__(self, tier: FileTier, names: Sequence[bytes], lengths: Sequence[int]) -> None:
        self.tier, self.names, self.lengths = tier, names, lengths

    def read(self, layer: int, out: Tensor) -> Tensor:
        """See `LayerSource`. OSError if a chunk is gone, Damaged if it was altered."""
        at = 0
        for name, length in zip(self.names, self.lengths, strict=True):
            head = self.tier.head(name)
            record = None
            if head is not None:
                first = layer * head.layout.layer_pages
                record = self.tier.read(name, [(first, first + head.layout.layer_pages)])
            if record is None:
                raise OSError(f"chunk {name[16:].hex()} is not in the file tier: prefill it again")
            layout = record[0].layout
            rows = record[1].view(layout.torch_dtype).view(layout.tokens, 2, layout.kv_heads, layout.head_dim)
            out[at : at + length] = rows[:length]
            at += length
        return out


class HostLayers:
    """Rows in host memory: kv [layers, rows, 2, kv_heads, head_dim], pinned here beside a GPU."""

    resident = True

    def __init__(self, kv: Tensor) -> None:
        self.kv = kv.pin_memory() if torch.cuda.is_available() else kv

    @classmethod
    def of(cls, chunks: Sequence[ChunkKV]) -> "HostLayers":
        """The rows of consecutive chunks."""
        return cls(torch.cat([torch.stack((c.k, c.v), 2) for c in chunks], 1))

    def read(self, layer: int, out: Tensor) -> Tensor:
        """See `LayerSource`."""
        return self.kv[layer]
