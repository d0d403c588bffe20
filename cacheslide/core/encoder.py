"""Computes a policy's cached chunks exactly, in the context that its encoding names."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from cacheslide.core.keys import ChunkKey
from cacheslide.core.placement import Piece, PlacedChunks, Placement
from cacheslide.core.plan import Plan
from cacheslide.core.remembering import Contrast, Reduce, TokenKV
from cacheslide.core.request_builder import RequestBuilder
from cacheslide.core.selective_prefill import SelectivePrefill
from cacheslide.core.tensors import tensor_of
from cacheslide.models.adapter import KVBuffer, ModelAdapter
from cacheslide.policies.base import Encoding
from cacheslide.policies.memory import Memory, NoMemory
from cacheslide.positions.ccpe import PromptSlots, slots_in
from cacheslide.store.base import ChunkKV, ChunkStore
from cacheslide.store.persistent.shape import shape_of


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
    model : ModelAdapter
    store : ChunkStore
    store_dtype : torch.dtype
        Dtype of stored K, V and layer inputs.
    capture : frozenset of int
        Layers whose inputs are stored with every chunk.
    scores : bool
        Store remembered deviations with every chunk; they take a prefill of its other context (`Contrast`).
    memory : Memory, optional
        Makes the notes that are stored with every chunk.

    Attributes
    ----------
    row_layers : int
        Sum over layers of the rows computed so far: the cost of encoding.
    """

    def __init__(
        self,
        model: ModelAdapter,
        store: ChunkStore,
        store_dtype: torch.dtype,
        capture: frozenset[int] = frozenset(),
        scores: bool = False,
        memory: Memory | None = None,
    ) -> None:
        self.memory = NoMemory() if memory is None else memory
        self.model, self.store, self.store_dtype, self.capture, self.scores = model, store, store_dtype, capture, scores
        self.shape = shape_of(model, store_dtype)
        self.builder, self.executor = RequestBuilder(model), SelectivePrefill(model)
        self.row_layers = 0

    def encode(
        self,
        encoding: Encoding,
        plan: Plan,
        served: KVBuffer | None = None,
        anew: frozenset[ChunkKey] = frozenset(),
        unscored: Mapping[ChunkKey, ChunkKV] = MappingProxyType({}),
    ) -> int:
        """Compute and store the chunks of `plan` that are missing or named by `anew`; returns how many.

        `served` is exact KV of the plan's prompt, if available: scores then need no prefill of it. `unscored` chunks
        are stored without scores; they are scored too when scoring the missing ones has prefilled the other context
        anyway.
        """
        missing = [key in anew or not self.store.contains(key) for key in plan.keys]
        if any(missing):
            contrast = self.contrast(encoding, plan, served) if self.scores else None
            prompts: list[KVBuffer] = []
            parts = encoding.encode(self, plan.prompt, plan.positions, plan.chunks, plan.keys, missing)
            for number, exact, start, end in parts:
                scores = None
                if contrast is not None:
                    own = TokenKV.of_rows(exact.kv, exact.positions, start, end, self.model.device)
                    scores = contrast.scores(number, own)
                chunk = self._chunk(exact, start, end, scores)
                if self.memory.name:
                    known = exact.kv if encoding.in_prompt else served
                    notes = self.memory.notes(self.model, plan, number, chunk, self._prompt(plan, known, prompts))
                    chunk = replace(chunk, notes=notes)
                self.store_chunk(plan.keys[number], chunk)
            if contrast is not None and contrast.ready:
                self._score({i: unscored[k] for i, k in enumerate(plan.keys) if k in unscored}, contrast, missing)
        return sum(missing)

    def _prompt(self, plan: Plan, known: KVBuffer | None, made: list[KVBuffer]) -> Callable[[], KVBuffer]:
        """Exact KV of the plan's prompt when asked for: `known`, or that of a prefill, made once."""

        def prompt() -> KVBuffer:
            if known is None and not made:
                end = plan.chunks[-1].end
                ids, positions = plan.prompt.token_ids[:end], plan.positions[:end]
                made.append(self.prefill(ids, positions, slots=slots_in(plan.prompt), inputs=False).kv)
            return made[0] if known is None else known

        return prompt

    def _score(self, stored: Mapping[int, ChunkKV], contrast: Contrast, missing: Sequence[bool]) -> None:
        """Score stored chunks that have no scores; `stored` maps their number in the plan to the chunk."""
        for number, chunk in stored.items():
            scores = None if missing[number] else contrast.scores(number, TokenKV.of_chunk(chunk, self.model.device))
            if scores is not None:
                self.store.rescore(contrast.plan.keys[number], scores, chunk)

    def contrast(
        self, encoding: Encoding, plan: Plan, served: KVBuffer | None = None, reduce: Reduce | None = None
    ) -> Contrast:
        """The context against which the plan's chunks are scored; arguments as for `encode` and `Contrast`."""
        known = None if served is None else (served, plan.positions)
        return Contrast(self.model, plan, encoding.in_prompt, self._prefill_other, known, reduce)

    def _prefill_other(self, *prompt) -> tuple[KVBuffer, Sequence[int]]:
        exact = self.prefill(*prompt, inputs=False)
        return exact.kv, exact.positions

    def prefill(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        known: Sequence[Piece] = (),
        slots: PromptSlots | None = None,
        inputs: bool = True,
    ) -> "ExactKV":
        """Exact KV of `token_ids`; `known` pieces are its first rows, already exact at these positions.

        With `inputs`, layer inputs of the `capture` layers too.
        """
        kv = self.model.new_kv(len(token_ids))
        done = write_known(self.model, kv, known)
        request = self.builder.build(token_ids[done:], positions[done:], kv, start=done, slots=slots)
        [out] = self.executor.run([request], capture=self.capture if inputs else frozenset())
        self.row_layers += sum(out.tokens_computed)
        return ExactKV(kv, positions, out.layer_inputs, done)

    def _chunk(self, exact: "ExactKV", start: int, end: int, scores: Tensor | None) -> ChunkKV:
        """Rows [start, end) of an exact prefill as a chunk."""
        offset = exact.first_input
        layers = {layer: x[start - offset : end - offset] for layer, x in exact.layer_inputs.items()}
        return replace(self.cut(exact.kv, exact.positions, start, end, layer_inputs=layers), scores=scores)

    def store_chunk(self, key: ChunkKey, chunk: ChunkKV) -> None:
        """Store a chunk, in place of what can be replaced."""
        if not self.store.replace(key, chunk):
            self.store.put(key, chunk)

    def cut(
        self,
        kv,
        where: Sequence[int],
        start: int,
        end: int,
        generation: int = 0,
        layer_inputs: dict[int, Tensor] | None = None,
    ) -> ChunkKV:
        """Rows [start, end) of a KV buffer as a chunk; `where` holds the positions of all rows of the buffer."""
        chunk = read_chunk(self.model, kv, where, start, end, generation, layer_inputs)
        return chunk.to(self.store_dtype)


def write_known(model: ModelAdapter, kv: KVBuffer, known: Sequence[Piece]) -> int:
    """Write pieces, already at these positions, as the first rows of a KV buffer; returns the number of rows."""
    done = sum(p.length for p in known)
    if known:
        rows = torch.arange(done, device=model.device)
        source = PlacedChunks(known, rows, Placement("stored"), model.rotaries, model.dtype)
        for layer in range(model.num_layers):
            kv.write(layer, rows, *source.layer(layer))
    return done


def read_chunk(
    model: ModelAdapter,
    kv: KVBuffer,
    positions: Sequence[int],
    start: int,
    end: int,
    generation: int = 0,
    layer_inputs: dict[int, Tensor] | None = None,
) -> ChunkKV:
    """Rows [start, end) of a KV buffer as a chunk in the model's dtype; `positions` are those of the whole buffer."""
    rows = torch.arange(start, end, device=model.device)
    pairs = [kv.read(layer, rows) for layer in range(model.num_layers)]
    k, v = torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs])
    return ChunkKV(k, v, tensor_of(positions[start:end]), layer_inputs or {}, generation)


def prefill_exact(
    model: ModelAdapter, token_ids: Sequence[int], first_position: int = 0, slots: PromptSlots | None = None
):
    """The KV buffer of `token_ids` prefilled in full at positions `first_position`, `first_position` + 1, ...

    `slots` are the prompt's updated slots; a model with canonical slot offsets (CCPE) needs them.
    """
    kv, positions = model.new_kv(len(token_ids)), range(first_position, first_position + len(token_ids))
    SelectivePrefill(model).run([RequestBuilder(model).build(token_ids, positions, kv, slots=slots)])
    return kv
