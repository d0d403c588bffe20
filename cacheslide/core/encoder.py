"""Computes the KV that a policy caches for a prompt's chunks, exactly, in the context its encoding names."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cacheslide.core.keys import ChunkKey
from cacheslide.core.placement import Piece, PlacedChunks, Placement, tensor_of
from cacheslide.core.prefill_request import PrefillRequest
from cacheslide.core.prompt import Chunk, Prompt
from cacheslide.core.selective_prefill import SelectivePrefill
from cacheslide.models.adapter import KVBuffer
from cacheslide.policies.base import Encoding
from cacheslide.positions.ccpe import PromptSlots
from cacheslide.store.base import ChunkKV, ChunkStore
from cacheslide.store.shape import shape_of


@dataclass(frozen=True)
class ExactKV:
    """An exact prefill: KV buffer, positions of its rows, and captured layer inputs from row `first_input` on."""

    kv: KVBuffer
    positions: Sequence[int]
    layer_inputs: dict[int, Tensor]
    first_input: int


class ChunkEncoder:
    """Fills a store with the chunks of prompts.

    Parameters
    ----------
    model : ModelAdapter with `new_kv`, `dtype`, `device`
    store : ChunkStore
    store_dtype : torch.dtype
        What K, V and layer inputs are kept in.
    capture : frozenset of int
        Layers whose inputs are kept with every chunk.

    Attributes
    ----------
    row_layers : int
        Rows computed so far, once a layer: what encoding has cost.
    """

    def __init__(
        self, model, store: ChunkStore, store_dtype: torch.dtype, capture: frozenset[int] = frozenset()
    ) -> None:
        self.model, self.store, self.store_dtype, self.capture = model, store, store_dtype, capture
        self.shape = shape_of(model, store_dtype)
        self.executor = SelectivePrefill(model)
        self.row_layers = 0

    def encode(
        self,
        encoding: Encoding,
        prompt: Prompt,
        positions: Sequence[int],
        chunks: Sequence[Chunk],
        keys: Sequence[ChunkKey],
    ) -> int:
        """Compute and store the chunks that are missing; returns how many."""
        missing = [not self.store.contains(key) for key in keys]
        if any(missing):
            encoding.encode(self, prompt, positions, chunks, keys, missing)
        return sum(missing)

    def prefill(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        known: Sequence[Piece] = (),
        slots: PromptSlots | None = None,
    ) -> "ExactKV":
        """Exact KV of `token_ids`; `known` pieces are its first rows, already exact at these positions."""
        ids = torch.tensor(token_ids, device=self.model.device)
        where = torch.tensor(list(positions), device=self.model.device)
        kv, done = self.model.new_kv(len(ids)), sum(p.length for p in known)
        if slots and (describe := getattr(self.model, "describe", None)):
            describe(kv, slots)
        if known:
            source = PlacedChunks(known, where[:done], Placement("stored"), self.model.rotary, self.model.dtype)
            rows = torch.arange(done, device=ids.device)
            for layer in range(self.model.num_layers):
                kv.write(layer, rows, *source.layer(layer))
        request = PrefillRequest(ids[done:], where[done:], kv, reused=rows_none(ids), start=done)
        [out] = self.executor.run([request], capture=self.capture)
        self.row_layers += sum(out.tokens_computed)
        return ExactKV(kv, positions, out.layer_inputs, done)

    def store_chunk(self, key: ChunkKey, exact: "ExactKV", start: int, end: int) -> None:
        """Store rows [start, end) of an exact prefill as the chunk `key`."""
        offset = exact.first_input
        layers = {layer: x[start - offset : end - offset] for layer, x in exact.layer_inputs.items()}
        self.store.put(key, self.cut(exact.kv, exact.positions, start, end, layer_inputs=layers))

    def cut(
        self,
        kv,
        where: Sequence[int],
        start: int,
        end: int,
        generation: int = 0,
        layer_inputs: dict[int, Tensor] | None = None,
    ) -> ChunkKV:
        """Rows [start, end) of a KV buffer as a chunk; `where` are the positions of all of its rows."""
        rows = torch.arange(start, end, device=self.model.device)
        pairs = [kv.read(layer, rows) for layer in range(self.model.num_layers)]
        k, v = torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs])
        positions = tensor_of(where[start:end])
        return ChunkKV(k, v, positions, layer_inputs or {}, generation).to(self.store_dtype)


def prefill_exact(model, token_ids: Sequence[int], first_position: int = 0, slots: PromptSlots | None = None):
    """The KV buffer of `token_ids` prefilled in full at positions `first_position`, `first_position` + 1, ...

    `slots` says where updated slots lie; a model with canonical slot masses (CCPE) crosses them by these.
    """
    ids = torch.tensor(token_ids, device=model.device)
    kv, positions = model.new_kv(len(ids)), torch.arange(len(ids), device=ids.device) + first_position
    if slots and (describe := getattr(model, "describe", None)):
        describe(kv, slots)
    SelectivePrefill(model).run([PrefillRequest(ids, positions, kv, reused=rows_none(ids))])
    return kv


def rows_none(like: Tensor) -> Tensor:
    """No rows: an empty index tensor on the device of `like`."""
    return torch.zeros(0, dtype=torch.int64, device=like.device)
