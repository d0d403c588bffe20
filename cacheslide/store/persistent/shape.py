"""The shape of a model's chunks, and checks of chunks from files or servers against it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cacheslide.errors import StoreError
from cacheslide.models.adapter import ModelAdapter
from cacheslide.store.base import ChunkKV
from cacheslide.store.files import align
from cacheslide.store.pages import DTYPES, MOST_TOKENS, PageLayout
from cacheslide.store.persistent.record import MOST_BYTES_BESIDE, Accept, Head, Misfit


@dataclass(frozen=True)
class ChunkShape:
    """Sizes of every chunk of one model on one rank, in elements; 0 (or an empty `dtype`) means unknown.

    Chunks of another shape are never used: they would be read beyond their end or as other numbers.

    Attributes
    ----------
    dtype : str
        Dtype of K, V and layer inputs, as in "bfloat16".
    hidden : int
        Width of layer inputs.
    max_positions : int
        Upper bound of position indices.
    """

    layers: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    dtype: str = ""
    hidden: int = 0
    max_positions: int = 0

    def misfit(self, layout: PageLayout, positions: Tensor, tokens: int | None = None) -> str:
        """Why a chunk cannot be used, in one line; empty if it can.

        Parameters
        ----------
        positions : Tensor [n], int64, on the CPU
        tokens : int, optional
            Required number of tokens; any number by default.
        """
        for name, want in (("layers", self.layers), ("kv_heads", self.kv_heads), ("head_dim", self.head_dim),
                           ("dtype", self.dtype), ("tokens", tokens)):  # fmt: skip
            if want and (have := getattr(layout, name)) != want:
                return f"{name.removeprefix('kv_')} {have}, not {want}"
        if layout.inputs and self.hidden and layout.hidden != self.hidden:
            return f"layer inputs of width {layout.hidden}, not {self.hidden}"
        if layout.inputs and self.layers and layout.inputs[-1] >= self.layers:
            return f"an input of layer {layout.inputs[-1]}, where there are {self.layers}"
        low, high = (int(x) for x in positions.aminmax())
        if low < 0 or high >= (self.max_positions or 1 << 31):
            return f"positions from {low} to {high}, outside the model's {self.max_positions or 1 << 31}"
        return ""

    def misfit_of(self, chunk: ChunkKV, tokens: int | None = None) -> str:
        """`misfit` of a chunk in memory; the page size does not matter."""
        try:
            layout = PageLayout.of(chunk, MOST_TOKENS)
        except StoreError as wrong:
            return str(wrong)
        return self.misfit(layout, chunk.positions.cpu(), tokens)


@dataclass(frozen=True)
class Wanted(Accept):
    """Accepts chunks of the store's shape and page size.

    Attributes
    ----------
    tokens : int, optional
        Number of tokens of the requested chunk.
    """

    shape: ChunkShape
    page_tokens: int
    page_bytes: int
    max_generation: int
    tokens: int | None = None

    @property
    def most(self) -> int:
        """See `Accept`; allows for layer inputs of every layer."""
        if not self.tokens or not self.shape.layers:
            return Accept.most
        width = self.shape.hidden * DTYPES[self.shape.dtype].itemsize if self.shape.dtype in DTYPES else 0
        rows = -(-self.tokens // self.page_tokens) * self.page_tokens
        return MOST_BYTES_BESIDE + align(self.shape.layers * rows * (self.page_bytes // self.page_tokens + width + 28))

    def __call__(self, head: Head) -> None:
        layout = head.layout
        if layout.page_tokens != self.page_tokens or layout.page_bytes != self.page_bytes:
            raise Misfit(f"pages of {layout.page_tokens} tokens and {layout.page_bytes} bytes")
        if head.generation > self.max_generation:
            raise Misfit(f"generation {head.generation}, of at most {self.max_generation}")
        if why := self.shape.misfit(layout, head.positions, self.tokens):
            raise Misfit(why)


def shape_of(model: ModelAdapter, store_dtype: torch.dtype) -> ChunkShape:
    """The shape of a model's chunks in a store of `store_dtype`."""
    heads, dim, name = model.num_kv_heads, model.head_dim, name_of(store_dtype)
    return ChunkShape(model.num_layers, heads, dim, name, model.hidden_size, model.max_positions)


def name_of(dtype: torch.dtype) -> str:
    """A dtype's name in records."""
    return str(dtype).removeprefix("torch.")
