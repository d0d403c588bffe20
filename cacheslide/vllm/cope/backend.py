"""CoPE as an attention backend of vLLM: the paged cache holds unrotated keys, layers hold their position tables.

Decoding rows and other rows use different kernels; vLLM orders decoding requests first in a batch. On a CPU both use
the plain reference. Full CUDA graphs contain batches of decoding rows only: their launch depends only on the batch size
and the engine's longest sequence, and their rows lie in a buffer that is refilled every step.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm import _custom_ops
from vllm.config.cache import CacheDType
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from cacheslide.errors import ConfigError, ModelError
from cacheslide.kernels.cope.api import cope_attention, cope_decode
from cacheslide.positions.ccpe import SlotOffsets
from cacheslide.vllm.cope.slots import LayerOffsets


@dataclass
class CopeMetadata(AttentionMetadata):
    """Metadata of one step's batch.

    The first `decodes` requests have one token each, at rows `decoding` int32 [decodes] of their prompts, with the
    block table `decode_table` int32 [decodes, blocks]. The other requests' tokens follow: their `rows` int32 [n],
    offsets `bounds` int32 [requests - decodes + 1] and `block_table`; None if there are none. `max_row` bounds all
    rows.
    """

    num_actual_tokens: int
    decodes: int
    max_row: int
    decoding: Tensor
    decode_table: Tensor
    rows: Tensor | None = None
    bounds: Tensor | None = None
    block_table: Tensor | None = None
    slots: list[SlotOffsets] | None = None  # one per layer
    looked: bool = False  # whether slots have been looked up

    def slots_of(self, layer: int, offsets: LayerOffsets, block_size: int) -> SlotOffsets | None:
        """The slots that non-decoding rows cross by their calibrated offsets."""
        if not self.looked:  # in the forward: the connector sets slots between build and forward
            self.looked = True
            self.slots = offsets.of_batch(self.rows, self.bounds, self.block_table, block_size)
        return None if self.slots is None else self.slots[layer]


class CopeMetadataBuilder(AttentionMetadataBuilder[CopeMetadata]):
    """Builds `CopeMetadata` without waiting for the device."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        context = vllm_config.compilation_config.static_forward_context
        self.has_offsets = context[layer_names[0]].cope_offsets.known > 0
        sizes = (
            vllm_config.scheduler_config.max_num_seqs,
            *(vllm_config.compilation_config.cudagraph_capture_sizes or ()),
        )
        self.decoding = torch.zeros(max(sizes), dtype=torch.int32, device=device)  # read by captured graphs

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CopeMetadata:
        """See `AttentionMetadataBuilder.build`."""
        batch = common_attn_metadata
        tokens = batch.num_actual_tokens
        # A prompt's last row alone in a step may belong to a fixed chunk, which crosses slots: it is not a decoding
        # row.
        short = self.has_offsets and batch.is_prefilling is not None and bool(batch.is_prefilling.any())
        decodes, _, decoding, _ = split_decodes_and_prefills(batch, treat_short_extends_as_decodes=not short)
        if decoding != decodes:
            raise RuntimeError(f"{decodes} decoding requests have {decoding} rows")
        decoding, table = self.decoding[:decodes], batch.block_table_tensor
        # Requests that pad a graph's batch have length 0: they read row 0 of the block table's first block.
        torch.sub(batch.seq_lens[:decodes], 1, out=decoding).clamp_(min=0)
        made = CopeMetadata(tokens, decodes, batch.max_seq_len - 1, decoding, table[:decodes])
        if decodes < tokens:
            ends = batch.query_start_loc[decodes + 1 :]
            lengths = ends - batch.query_start_loc[decodes:-1]
            first = batch.seq_lens[decodes:] - ends  # row = index in the batch + this
            offsets = torch.repeat_interleave(first, lengths, output_size=tokens - decodes)
            made.rows = offsets + torch.arange(decodes, tokens, dtype=torch.int32, device=offsets.device)
            made.bounds = batch.query_start_loc[decodes:] - decodes
            # A separate allocation begins at an aligned address: another alignment would compile the kernel anew.
            made.block_table = table[decodes:].clone() if decodes else table
        return made

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> CopeMetadata:
        """A batch whose graph is valid for any rows; during capture all of them are row 0."""
        metadata = self.build(0, common_attn_metadata)
        metadata.max_row = self.vllm_config.model_config.max_model_len - 1
        metadata.decoding.zero_()
        return metadata


class CopeImpl(AttentionImpl[CopeMetadata]):
    """Attention of one layer; `cope_layer` is its index, `cope_positions` its position table [p_max, head_dim].

    `cope_offsets`, shared by all layers, holds the rows of a batch that cross updated slots by their calibrated offset.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        if not CopeBackend.supports_kv_cache_dtype(kv_cache_dtype):
            raise ConfigError(f"CoPE attention does not work with the KV cache type {kv_cache_dtype}")
        refusals = {
            "ALiBi": alibi_slopes is not None,
            "sliding windows": sliding_window is not None,
            "a soft cap of logits": bool(logits_soft_cap),
            f"attention of type {attn_type}": attn_type != AttentionType.DECODER,
            "KV shared between layers": kv_sharing_target_layer_name is not None,
        }
        for feature, wanted in refusals.items():
            if wanted:
                raise ModelError(f"CoPE attention does not work with {feature}")

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor):
        """Store key, value [n, kv_heads, head_size] at `slot_mapping` [n]; slots below 0 are skipped."""
        if kv_cache.is_cuda:
            halves = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
            scales = layer._k_scale, layer._v_scale
            _custom_ops.reshape_and_cache_flash(key, value, *halves, slot_mapping, self.kv_cache_dtype, *scales)
            return
        kept = slot_mapping >= 0
        slots, size = slot_mapping[kept], kv_cache.shape[2]
        both = torch.cat((key, value), dim=-1)[: len(kept)][kept]
        kv_cache[slots // size, :, slots % size] = both.to(kv_cache.dtype)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CopeMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """See `AttentionImpl.forward`: query, output [tokens, heads, head_size]; keys are in the cache already."""
        positions = layer.cope_positions
        if attn_metadata is None:  # profiling: must allocate the scratch for a whole batch's position logits
            if query.is_cuda:
                torch.empty(query.shape[0] * query.shape[1] * (len(positions) + 2), device=query.device)
            return output.fill_(0)
        batch = attn_metadata
        tokens, decodes = batch.num_actual_tokens, batch.decodes
        if decodes:
            cope_decode(
                query[:decodes], batch.decoding, batch.decode_table, kv_cache, positions, self.scale, output[:decodes],
                batch.max_row,
            )  # fmt: skip
        if decodes < tokens:
            slots = batch.slots_of(layer.cope_layer, layer.cope_offsets, kv_cache.shape[2])
            cope_attention(
                query[decodes:tokens], batch.rows, batch.bounds, batch.block_table, kv_cache, positions, self.scale,
                output[decodes:tokens], batch.max_row, slots,
            )  # fmt: skip
        return output


class CopeBackend(AttentionBackend):
    """Description of the backend for vLLM. Attention layers name it directly; vLLM never selects it."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[CopeImpl]:
        return CopeImpl

    @staticmethod
    def get_builder_cls() -> type[CopeMetadataBuilder]:
        return CopeMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int | MultipleOf]:
        return [MultipleOf(16)]
