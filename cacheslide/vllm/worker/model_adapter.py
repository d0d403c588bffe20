"""A `ModelAdapter` over the model loaded by vLLM: calls its projections, norms and MLP layer by layer."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.models.interfaces_base import is_text_generation_model

from cacheslide.core.tensors import send
from cacheslide.errors import ModelError
from cacheslide.models.adapter import RowGroup, refuse_narrow, write_each
from cacheslide.models.attention import row_attention
from cacheslide.models.dense_kv import DenseKV
from cacheslide.positions.ccpe import PromptSlots, check_slots
from cacheslide.positions.rope import Rotary, inverse_frequencies
from cacheslide.vllm.cope.setting import is_cope
from cacheslide.vllm.cope.slots import LayerOffsets
from cacheslide.vllm.geometry import Geometry
from cacheslide.vllm.worker.attention import RowKernel
from cacheslide.vllm.worker.attentions import choose
from cacheslide.vllm.worker.kv_layout import PackedSlots, PagedKV, PagedLayer, in_one_cache, scratch_kv
from cacheslide.vllm.worker.operators import fused_norms, operators
from cacheslide.vllm.worker.paged_source import Caches

_PROBED = 1024  # positions at which both rotations are compared
MLP_ROWS = 8192  # rows per MLP call: bounds activation memory, which vLLM's profiling run does not include


def find_model(static_forward_context: Mapping[str, object]) -> torch.nn.Module:
    """The loaded causal language model whose attention layers vLLM registered in `static_forward_context`.

    vLLM gives a connector the KV caches but not the model. Searching the live modules once avoids changes to the model
    registry, which would affect every server of this installation.
    """
    for module in gc.get_objects():
        # issubclass, since isinstance would evaluate __class__ of every live object, which proxies compute
        if issubclass(type(module), torch.nn.Module):
            layers = getattr(getattr(module, "model", None), "layers", None)
            attention = getattr(getattr(layers[0], "self_attn", None), "attn", None) if layers else None
            registered = attention is not None and static_forward_context.get(attention.layer_name) is attention
            if registered and is_text_generation_model(type(module)):
                return module
    raise ModelError("the loaded model was not found among this process's modules")


def rotary_of(model: torch.nn.Module, config) -> Rotary:
    """Rotation tables for the model; ModelError unless they equal the model's rotation."""
    embedding = model.model.layers[0].self_attn.rotary_emb
    parameters = dict(config.rope_parameters)
    inv = inverse_frequencies(embedding.head_size, float(parameters.pop("rope_theta", 10000.0)), parameters)
    cos, sin = embedding.cos_sin_cache.float().chunk(2, dim=-1)
    rotary = Rotary(inv, len(cos), cos.device)
    if not embedding.is_neox_style or cos.shape != rotary.cos.shape:
        raise ModelError("only full rotary embeddings in the half-split layout are supported")
    # The model's angles are float32: errors grow with the position. A wrong schedule shows in the first positions.
    apart = max((x[:_PROBED] - y[:_PROBED]).abs().max().item() for x, y in ((cos, rotary.cos), (sin, rotary.sin)))
    if apart > {torch.bfloat16: 5e-3, torch.float16: 1e-3}.get(embedding.cos_sin_cache.dtype, 3e-4):
        raise ModelError(f"the model rotates differently from what its rope parameters say: {config.rope_parameters}")
    if embedding.cos_sin_cache.dtype == torch.float32:  # one table for both uses; a rounded one moves worse
        rotary.cos, rotary.sin = cos, sin
    return rotary


def unrotated(model: torch.nn.Module) -> Rotary:
    """Tables for a CoPE model: angle 0, one position, since nothing is rotated."""
    first = model.model.layers[0]
    return Rotary(torch.zeros(first.self_attn.head_dim // 2), 1, first.input_layernorm.weight.device)


class VllmModel:
    """A loaded Llama, Mistral (CoPE or not), Qwen2 or Qwen3 for the executor; this rank's heads only.

    Parameters
    ----------
    model : torch.nn.Module
        The model loaded by vLLM.
    config : transformers PretrainedConfig
        Its text configuration.
    geometry : Geometry
        Of this engine: gives the model's name and its positions.
    """

    def __init__(self, model: torch.nn.Module, config, geometry: Geometry) -> None:
        self.model = model
        self.model_id, self.max_positions = geometry.model_id, geometry.max_positions
        self.layers = list(model.model.layers)
        self.num_layers = len(self.layers)
        self.rotates = not is_cope(config)
        rotary = rotary_of(model, config) if self.rotates else unrotated(model)
        self.rotaries = [rotary] * self.num_layers  # models with more than one are refused (`vllm/support.py`)
        self.ranks = get_tensor_model_parallel_world_size()
        self.paged = [PagedLayer(layer.self_attn.attn) for layer in self.layers]
        self.open = not self.paged[0].packed  # layout of the cache
        self.caches = Caches(self.paged)
        self.attend_paged, self.slots = choose(self.paged), PackedSlots()
        first = self.layers[0].self_attn
        self.slot_offsets: LayerOffsets | None = getattr(first.attn, "cope_offsets", None)
        self.num_heads, self.num_kv_heads, self.head_dim = first.num_heads, first.num_kv_heads, first.head_dim
        self.hidden_size = config.hidden_size
        self.scale = float(first.attn.impl.scale)
        norm = self.layers[0].input_layernorm.weight
        self.dtype, self.device = norm.dtype, norm.device
        self.ops = operators(self.device)
        self.schema_positions = False

    def new_kv(self, capacity: int) -> DenseKV | PagedKV:
        """Scratch KV outside the paged cache, for encoding chunks."""
        if self.open:
            block = self.paged[0].block_size  # kernels are compiled for this size
            sizes = self.num_layers, capacity, self.num_kv_heads, self.head_dim
            return scratch_kv(*sizes, self.dtype, self.device, block)
        return DenseKV(self, capacity, self.dtype, self.device)

    @contextmanager
    def running(self, schema_positions: bool = False) -> Iterator[None]:
        """Context of a run. `schema_positions`: rows may have positions below 0, which vLLM's tables lack."""
        self.schema_positions = schema_positions and self.rotates
        try:
            with fused_norms(self.device):
                yield
        finally:
            self.schema_positions = False
            self.slots.forget()
            if isinstance(self.attend_paged, RowKernel):
                self.attend_paged.forget()

    def describe(self, kv: PagedKV, slots: PromptSlots) -> None:
        """See `ModelAdapter.describe`; does nothing for models without calibrated slot offsets."""
        if self.slot_offsets is not None and self.slot_offsets.known:
            check_slots(slots, self.slot_offsets.known)
            kv.updated = PromptSlots(slots.bounds, send(slots.canonical, self.device))

    def paged_kv(self, block_ids: Sequence[int], manager_block: int) -> PagedKV:
        """A request's KV in the paged cache."""
        return PagedKV(self.paged, block_ids, manager_block)

    def embed(self, token_ids: Tensor) -> Tensor:
        """See `ModelAdapter.embed`."""
        return self.model.model.embed_input_ids(token_ids)

    def qkv(self, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `ModelAdapter.qkv`."""
        attention = self.layers[layer].self_attn
        dim = attention.head_dim
        if not len(hidden):
            empty = hidden.new_zeros(0, 1, dim)
            return empty.expand(0, attention.num_heads, dim), *2 * (empty.expand(0, attention.num_kv_heads, dim),)
        projected, _ = attention.qkv_proj(self.layers[layer].input_layernorm(hidden))
        q, k, v = projected.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
        if hasattr(attention, "q_norm"):
            q = attention.q_norm(q.unflatten(-1, (-1, dim))).flatten(1)
            k = attention.k_norm(k.unflatten(-1, (-1, dim))).flatten(1)
        if not self.schema_positions:
            q, k = self.ops(attention.rotary_emb)(positions, q, k)
        q, k, v = (x.unflatten(-1, (-1, dim)) for x in (q, k, v))
        if self.schema_positions:
            rotary = self.rotaries[layer]
            q, k = rotary.rotate(q, positions), rotary.rotate(k, positions)
        return q, k, v

    def write(self, layer: int, groups: Sequence[RowGroup], k: Tensor, v: Tensor) -> None:
        """See `ModelAdapter.write`; one call if all requests are in one cache."""
        if in_one_cache(groups):
            groups[0].kv.layers[layer].write(self.slots.of(groups), k, v)
        else:
            write_each(layer, groups, k, v)

    def attend(self, layer: int, q: Tensor, groups: Sequence[RowGroup]) -> Tensor:
        """See `ModelAdapter.attend`. Groups are all in the paged cache, or all scratch."""
        refuse_narrow(groups)
        if all(isinstance(g.kv, PagedKV) for g in groups):
            return self.attend_paged(layer, q, groups, self.scale)
        parts = zip(q.split([len(g.rows) for g in groups]), groups, strict=True)
        return torch.cat([row_attention(x, g.kv.k[layer], g.kv.v[layer], g.rows) for x, g in parts if len(g.rows)])

    def finish(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        """See `ModelAdapter.finish`."""
        block = self.layers[layer]
        projected, _ = block.self_attn.o_proj(attended.flatten(1))
        normed, hidden = block.post_attention_layernorm(projected, hidden)
        for x, residual in zip(normed.split(MLP_ROWS), hidden.split(MLP_ROWS), strict=True):
            residual += self._mlp(block.mlp, x)
        return hidden

    def _mlp(self, mlp: torch.nn.Module, x: Tensor) -> Tensor:
        gates, _ = mlp.gate_up_proj(x)
        return mlp.down_proj(self.ops(mlp.act_fn)(gates))[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """See `ModelAdapter.logits`."""
        return self.model.compute_logits(self.model.model.norm(hidden)).float()

    def reduce_scores(self, scores: Tensor) -> Tensor:
        """See `ModelAdapter.reduce_scores`."""
        return tensor_model_parallel_all_reduce(scores) if self.ranks > 1 else scores
