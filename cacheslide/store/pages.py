"""Pages: one layer of N tokens, the unit that is moved, corrected, evicted and checksummed.

A chunk of n tokens is stored token by token: row t of layer l is its key and value, [2, kv_heads, head_dim]. A page is
`page_tokens` rows of one layer; a chunk's last page is shorter. Layer inputs of probe layers are cut into pages of at
most the same number of bytes, after the K/V pages. Positions and scores are not paged: 8 and 4 bytes a token in the
index.
"""

from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from cacheslide.errors import StoreError
from cacheslide.store.base import ChunkKV
from cacheslide.store.strict import is_count

MOST_PAGES = 1 << 20  # per chunk: page ids reserve this many page numbers
MOST_TOKENS = 1 << 22  # per chunk
MOST_BYTES = 1 << 34  # per chunk, in pages
_MOST = 1 << 31  # limit of any size in a layout
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)}


@dataclass(frozen=True)
class PageLayout:
    """The pages of a chunk of `tokens` tokens. Sizes in elements; `inputs` are probe layers."""

    layers: int
    tokens: int
    kv_heads: int
    head_dim: int
    dtype: str
    page_tokens: int
    inputs: tuple[int, ...] = ()
    hidden: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise StoreError(f"chunks are stored as {', '.join(DTYPES)}, not {self.dtype}")
        if min(self.layers, self.tokens, self.kv_heads, self.head_dim, self.page_tokens) < 1:
            raise StoreError(f"a page layout needs sizes of at least 1: {self}")
        if self.inputs and (self.hidden < 1 or self.input_row_bytes > self.page_bytes):
            raise StoreError(f"{self.page_tokens} tokens a page are too few to hold one layer input: raise page_tokens")
        if self.payload_bytes > MOST_BYTES or self.pages > MOST_PAGES or self.tokens > MOST_TOKENS:
            limits = f"{MOST_TOKENS} tokens, {MOST_PAGES} pages and {MOST_BYTES} bytes"
            raise StoreError(f"a chunk has at most {limits}: {self}")

    @classmethod
    def of(cls, chunk: ChunkKV, page_tokens: int) -> "PageLayout":
        """The layout of `chunk`; its layer inputs must have the dtype of K and V."""
        layers, tokens, heads, dim = chunk.k.shape
        dtype = str(chunk.k.dtype).removeprefix("torch.")
        if any(x.dtype != chunk.k.dtype for x in (chunk.v, *chunk.layer_inputs.values())):
            raise StoreError("K, V and layer inputs of a chunk must have one dtype")
        widths = {x.shape[1] for x in chunk.layer_inputs.values()}
        if len(widths) > 1:
            raise StoreError(f"layer inputs must have one width, not {sorted(widths)}")
        return cls(
            layers, tokens, heads, dim, dtype, page_tokens, tuple(sorted(chunk.layer_inputs)), max(widths, default=0)
        )

    @classmethod
    def from_dict(cls, raw: dict) -> "PageLayout":
        """The layout in a record's JSON header; StoreError if it is invalid."""
        if not isinstance(raw, dict) or set(raw) != set(cls.__dataclass_fields__):
            raise StoreError("not a page layout: other fields")
        inputs = raw["inputs"]
        sizes = [v for k, v in raw.items() if k not in ("dtype", "inputs")]
        listed = isinstance(inputs, list) and all(is_count(x, 0, _MOST) for x in inputs)
        if not listed or sorted(set(inputs)) != inputs or not isinstance(raw["dtype"], str):
            raise StoreError("not a page layout: fields of other types")
        if not all(is_count(x, 0, _MOST) for x in sizes):
            raise StoreError("not a page layout: sizes that are none")
        return cls(**(raw | {"inputs": tuple(inputs)}))

    def as_dict(self) -> dict:
        """The layout for a record's JSON header."""
        return asdict(self)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of K, V and layer inputs."""
        return DTYPES[self.dtype]

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one token's K and V in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.torch_dtype.itemsize

    @cached_property
    def input_row_bytes(self) -> int:
        """Bytes of one token's layer input."""
        return self.hidden * self.torch_dtype.itemsize

    @cached_property
    def page_bytes(self) -> int:
        """Bytes of a full page: the slot size of the memory tiers."""
        return self.page_tokens * self.row_bytes

    @cached_property
    def layer_pages(self) -> int:
        """K/V pages per layer."""
        return -(-self.tokens // self.page_tokens)

    @cached_property
    def input_page_tokens(self) -> int:
        """Rows per page of layer inputs."""
        return self.page_bytes // self.input_row_bytes if self.inputs else 0

    @cached_property
    def input_pages(self) -> int:
        """Pages per probe layer."""
        return -(-self.tokens // self.input_page_tokens) if self.inputs else 0

    @cached_property
    def pages(self) -> int:
        """Pages of the chunk: those of each layer, then those of the probe layers' inputs."""
        return self.layers * self.layer_pages + len(self.inputs) * self.input_pages

    @cached_property
    def kv_bytes(self) -> int:
        """Bytes of all K/V rows."""
        return self.layers * self.tokens * self.row_bytes

    @cached_property
    def payload_bytes(self) -> int:
        """Bytes of all pages; positions are not counted."""
        return self.kv_bytes + len(self.inputs) * self.tokens * self.input_row_bytes

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """Offsets of the pages in the payload, and its end: pages + 1 numbers."""
        out = [0]
        parts = [(self.layers, self.page_tokens, self.row_bytes)]
        parts += [(len(self.inputs), self.input_page_tokens, self.input_row_bytes)] if self.inputs else []
        for count, per_page, row in parts:
            for _ in range(count):
                start = out[-1]
                out += [start + min(per_page * i, self.tokens) * row for i in range(1, -(-self.tokens // per_page) + 1)]
        return tuple(out)

    def page_of(self, layer: int, row: int) -> int:
        """Number of the K/V page with `row` of `layer`."""
        return layer * self.layer_pages + row // self.page_tokens

    def rows_of(self, page: int) -> int:
        """Number of tokens in page number `page`."""
        row = self.row_bytes if page < self.layers * self.layer_pages else self.input_row_bytes
        return (self.bounds[page + 1] - self.bounds[page]) // row


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor as uint8 [bytes]."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def to_payload(chunk: ChunkKV, layout: PageLayout) -> Tensor:
    """All pages of `chunk` in order: uint8 [payload_bytes] on the chunk's device."""
    parts = [as_bytes(torch.stack((chunk.k, chunk.v), dim=2))]
    parts += [as_bytes(chunk.layer_inputs[layer]) for layer in layout.inputs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def kv_views(payload: Tensor, layout: PageLayout) -> Tensor:
    """K/V rows of a payload, as a view: [layers, tokens, 2, kv_heads, head_dim]."""
    kv = payload[: layout.kv_bytes].view(layout.torch_dtype)
    return kv.view(layout.layers, layout.tokens, 2, layout.kv_heads, layout.head_dim)


def side_by_side(k: Tensor, v: Tensor) -> Tensor | None:
    """K and V of a chunk as one view, if their memory has the layout of its pages; else None.

    [layers, tokens, 2, kv_heads, head_dim], contiguous: one copy moves it; K or V alone take one copy per row.
    """
    layers, tokens, heads, dim = k.shape
    row = heads * dim
    apart = (2 * row * tokens, 2 * row, dim, 1)
    if k.untyped_storage().data_ptr() != v.untyped_storage().data_ptr() or k.stride() != apart or v.stride() != apart:
        return None
    if v.storage_offset() != k.storage_offset() + row:
        return None
    return k.as_strided((layers, tokens, 2, heads, dim), (2 * row * tokens, 2 * row, row, dim, 1))


def from_payload(
    payload: Tensor, layout: PageLayout, positions: Tensor, generation: int, scores: Tensor | None = None
) -> ChunkKV:
    """The chunk whose pages are `payload`, as views of it."""
    kv, at, inputs = kv_views(payload, layout), layout.kv_bytes, {}
    for layer in layout.inputs:
        end = at + layout.tokens * layout.input_row_bytes
        inputs[layer] = payload[at:end].view(layout.torch_dtype).view(layout.tokens, layout.hidden)
        at = end
    return ChunkKV(kv[:, :, 0], kv[:, :, 1], positions, inputs, generation, scores)


def paged(payload: Tensor, layout: PageLayout) -> Tensor:
    """The payload cut into slots: uint8 [pages, page_bytes], short pages padded with zeros."""
    kv = payload[: layout.kv_bytes].view(layout.layers, layout.tokens * layout.row_bytes)
    room = layout.layer_pages * layout.page_bytes
    parts = [pad(kv, (0, room - kv.shape[1])).view(-1, layout.page_bytes)]
    if layout.inputs:
        rows = payload[layout.kv_bytes :].view(len(layout.inputs), layout.tokens * layout.input_row_bytes)
        wide = layout.input_page_tokens * layout.input_row_bytes
        rows = pad(rows, (0, layout.input_pages * wide - rows.shape[1])).view(-1, wide)
        parts.append(pad(rows, (0, layout.page_bytes - wide)))
    return torch.cat(parts)


def packed(slots: Tensor, layout: PageLayout) -> Tensor:
    """The inverse of `paged`: uint8 [payload_bytes]; slots may be wider than a page."""
    kv = slots[: layout.layers * layout.layer_pages, : layout.page_bytes].reshape(layout.layers, -1)
    parts = [kv[:, : layout.tokens * layout.row_bytes].reshape(-1)]
    if layout.inputs:
        wide = layout.input_page_tokens * layout.input_row_bytes
        rows = slots[layout.layers * layout.layer_pages :, :wide].reshape(len(layout.inputs), -1)
        parts.append(rows[:, : layout.tokens * layout.input_row_bytes].reshape(-1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
