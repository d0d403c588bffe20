"""Layer-wise sources for `overlap.LoadWrite`: chunks read one layer at a time."""

from collections.abc import Sequence

from torch import Tensor

from cacheslide.store.base import ChunkKV
from cacheslide.store.filetier import FileTier


class FileLayers:
    """Chunks in the file tier, one after the other; each layer's pages are one read a chunk, checksums verified."""

    def __init__(self, tier: FileTier, names: Sequence[bytes], lengths: Sequence[int]) -> None:
        self.tier, self.names, self.lengths = tier, names, lengths

    def read(self, layer: int, out: Tensor) -> None:
        """See `LayerSource`. OSError when a chunk is gone, Damaged when it is not what was written."""
        at = 0
        for name, length in zip(self.names, self.lengths, strict=True):
            head = self.tier.head(name)
            found = None
            if head is not None:
                first = layer * head.layout.layer_pages
                found = self.tier.read(name, [(first, first + head.layout.layer_pages)])
            if found is None:
                raise OSError(f"chunk {name[16:].hex()} is not in the file tier: prefill it again")
            layout = found[0].layout
            rows = found[1].view(layout.torch_dtype).view(layout.tokens, 2, layout.kv_heads, layout.head_dim)
            out[at : at + length] = rows[:length]
            at += length


class MemoryLayers:
    """Chunks in host memory, one after the other."""

    def __init__(self, chunks: Sequence[ChunkKV], lengths: Sequence[int]) -> None:
        self.chunks, self.lengths = chunks, lengths

    def read(self, layer: int, out: Tensor) -> None:
        """See `LayerSource`."""
        at = 0
        for chunk, length in zip(self.chunks, self.lengths, strict=True):
            out[at : at + length, 0] = chunk.k[layer, :length]
            out[at : at + length, 1] = chunk.v[layer, :length]
            at += length
