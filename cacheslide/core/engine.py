"""One engine for every system: plan what a prompt can reuse, fill the store, prefill, and say what happened."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from cacheslide.core.encoder import ChunkEncoder, rows_none
from cacheslide.core.keys import CacheIdentity, ChunkKey, chunk_keys
from cacheslide.core.placement import Piece, PlacedChunks
from cacheslide.core.prefill_request import PrefillOutput, PrefillRequest
from cacheslide.core.prompt import Chunk, Prompt
from cacheslide.core.selective_prefill import SelectivePrefill
from cacheslide.errors import PromptError, StoreError
from cacheslide.policies.base import ReusePolicy
from cacheslide.positions.ccpe import slots_in
from cacheslide.store.base import ChunkKV, ChunkStore, Fetched


@dataclass(frozen=True)
class Plan:
    """What a policy makes of a prompt: its (transformed) text, row positions, chunks and their keys."""

    prompt: Prompt
    positions: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    keys: tuple[ChunkKey, ...]


def make_plan(
    policy: ReusePolicy, identity: CacheIdentity, prompt: Prompt, chunk_size: int, max_positions: int
) -> Plan:
    """What `policy` makes of `prompt`; a serving scheduler, which has no model, plans with it too."""
    prompt = policy.transform(prompt)
    positions = policy.placement.positions(prompt)
    if positions[-1] >= max_positions:
        raise PromptError(f"the prompt needs {positions[-1] + 1} positions, the model has {max_positions}")
    chunks = prompt.chunks(chunk_size) if policy.reuses else ()
    keys = chunk_keys(policy.keying, policy.encoding.name, identity, prompt, chunks, positions)
    return Plan(prompt, tuple(positions), chunks, tuple(keys))


@dataclass
class Receipt:
    """What really happened to one request. Rows are tokens; bytes are those read from the store.

    `generation` is the oldest of the chunks it read: 0 where all were computed exactly.
    """

    system: str
    tokens: int
    tokens_reused: int = 0
    tokens_recomputed: int = 0
    compute_fraction: float = 1.0
    tokens_per_layer: list[int] = field(default_factory=list)
    chunks: int = 0
    chunks_hit: int = 0
    bytes_loaded: int = 0
    fallback: str = ""
    alpha: dict[int, float] = field(default_factory=dict)
    generation: int = 0

    def as_dict(self) -> dict:
        """For a JSON record."""
        return asdict(self)


@dataclass
class Prefilled:
    """A completed prompt and its plan: KV of `length` rows, the last row's logits [vocab_size], the next position."""

    kv: object
    length: int
    next_position: int
    logits: Tensor | None
    receipt: Receipt
    output: PrefillOutput
    plan: Plan


@dataclass(frozen=True)
class Kept:
    """What `ReuseEngine.keep` did: chunks copied from a request's KV at `generation`, or encoded exactly."""

    copied: int = 0
    encoded: int = 0
    generation: int = 0


class ReuseEngine:
    """Serves prompts under one policy.

    Parameters
    ----------
    model : ModelAdapter with `new_kv`, `model_id`, `dtype`, `device`
    policy : ReusePolicy
    store : ChunkStore
    chunk_size : int
        Fixed segments are cached in pieces of at most this many tokens.
    suffix_len : int
        This many tokens at the prompt's end are always recomputed; at least 1 when logits are wanted.
    namespace : str
        Tenants of different namespaces never see each other's chunks.
    corrected : ChunkStore, optional
        Where `keep` puts KV that rests on reused KV. It is read where `store` lacks a chunk, so that an exact copy
        always comes first and a corrected one is never taken for a chunk's reference copy.
    """

    def __init__(
        self,
        model,
        policy: ReusePolicy,
        store: ChunkStore,
        *,
        chunk_size: int = 1024,
        suffix_len: int = 1,
        namespace: str = "",
        store_dtype: torch.dtype | None = None,
        capture: frozenset[int] = frozenset(),
        corrected: ChunkStore | None = None,
    ) -> None:
        if suffix_len < 1:
            raise PromptError(f"suffix_len must be at least 1, not {suffix_len}")
        self.model, self.policy, self.store, self.corrected = model, policy, store, corrected
        self.chunk_size, self.suffix_len = chunk_size, suffix_len
        store_dtype = store_dtype or model.dtype
        self.identity = CacheIdentity(model.model_id, str(store_dtype), namespace=namespace)
        self.encoder = ChunkEncoder(model, store, store_dtype, capture | policy.probe_layers)
        self.executor = SelectivePrefill(model)

    def plan(self, prompt: Prompt) -> Plan:
        """Positions, chunks and keys of `prompt`; touches neither model nor store."""
        return make_plan(self.policy, self.identity, prompt, self.chunk_size, self.model.rotary.max_positions)

    def build(self, prompt: Prompt) -> int:
        """Compute and store the chunks of `prompt` that the store lacks; returns how many."""
        plan = self.plan(prompt)
        if not plan.chunks:
            return 0
        return self.encoder.encode(self.policy.encoding, plan.prompt, plan.positions, plan.chunks, plan.keys)

    @torch.inference_mode()
    def keep(self, state: Prefilled, prompt: Prompt, limit: int) -> Kept:
        """Keep the chunks of `prompt` that no store has, out of the KV that serving it left in `state`.

        Copying computes nothing, but KV that was computed over reused rows carries their error on: a copy is one
        generation older than the oldest chunk behind it. Beyond `limit` generations the prompt's corrected chunks are
        encoded anew, exactly, and so are those of encodings other than "in_prompt". Prefix caching stays exact.

        Parameters
        ----------
        prompt : Prompt
            The prompt that was served, whose fixed segments may go on into generated text: the rows of `state` behind
            the prompt, up to and without the last token generated (it has no KV yet).
        limit : int
            0 or more.
        """
        if limit < 0:
            raise PromptError(f"a limit of generations is at least 0, not {limit}")
        plan = self.plan(prompt)
        if not plan.chunks or all(map(self._has, plan.keys)):
            return Kept()
        exact = state.receipt.chunks_hit == 0 or self.policy.keying.exact
        generation = 0 if exact else state.receipt.generation + 1
        store = self.store if generation == 0 else self.corrected
        if generation > limit or store is None or not self._holds(state, plan):
            encoded = self.encoder.encode(self.policy.encoding, plan.prompt, plan.positions, plan.chunks, plan.keys)
            return Kept(encoded=encoded)
        missing = [(c, k) for c, k in zip(plan.chunks, plan.keys, strict=True) if not self._has(k)]
        for chunk, key in missing:
            store.put(key, self.encoder.cut(state.kv, plan.positions, chunk.start, chunk.end, generation))
        return Kept(len(missing), 0, generation)

    def _has(self, key: ChunkKey) -> bool:
        return self.store.contains(key) or (self.corrected is not None and self.corrected.contains(key))

    def _holds(self, state: Prefilled, plan: Plan) -> bool:
        """Whether the KV of `state` is that of the plan's chunks, in the context their encoding names."""
        served, rows = state.plan, len(state.plan.prompt)
        same = plan.prompt.token_ids[:rows] == served.prompt.token_ids[: len(plan.prompt)]
        same = same and plan.positions[:rows] == served.positions[: len(plan.prompt)]
        in_prompt = self.policy.encoding.in_prompt and not self.encoder.capture
        return in_prompt and same and plan.chunks[-1].end <= state.length

    def prefill(self, prompt: Prompt, following: int = 0, room: int = 0) -> Prefilled:
        """Complete the KV of `prompt`, reusing what the store holds. See `prefill_batch`."""
        return self.prefill_batch([prompt], following, room)[0]

    @torch.inference_mode()
    def prefill_batch(self, prompts: Sequence[Prompt], following: int = 0, room: int = 0) -> list[Prefilled]:
        """Complete the KV of several prompts in one packed run.

        `following` tokens will be appended with `extend` before anything is generated: they count towards
        `suffix_len`, so that prefilling a context first and a question later reuses the same rows as doing both
        at once. `room` rows of the KV buffer are left for them and for generated tokens.
        """
        prepared = [self._prepare(p, following, room) for p in prompts]
        outputs = self.executor.run([request for request, _, _ in prepared])
        return [self._finish(*p, output) for p, output in zip(prepared, outputs, strict=True)]

    def _prepare(self, prompt: Prompt, following: int, room: int) -> tuple[PrefillRequest, Plan, Receipt]:
        plan, device = self.plan(prompt), self.model.device
        rows = len(plan.prompt)
        ids = torch.tensor(plan.prompt.token_ids, device=device)
        positions = torch.tensor(plan.positions, device=device)
        receipt = Receipt(self.policy.name, rows, chunks=len(plan.chunks))
        limit = rows - max(0, self.suffix_len - following)
        pieces, spans = [], []
        for chunk, key in zip(plan.chunks, plan.keys, strict=True):
            length = min(chunk.end, limit) - chunk.start
            held = self._fetch(key, len(chunk), receipt) if length > 0 else None
            if held is not None:
                receipt.chunks_hit += 1
                receipt.bytes_loaded += held.nbytes
                receipt.generation = max(receipt.generation, held.generation)
                pieces.append(Piece(held, length))
                spans.append(torch.arange(chunk.start, chunk.start + length, device=device))
        reused = torch.cat(spans) if spans else rows_none(ids)
        if plan.chunks and not spans and not receipt.fallback:
            receipt.fallback = "no chunk of this prompt is in the store"
        source = None
        if pieces:
            place = self.policy.placement
            source = PlacedChunks(pieces, positions[reused], place, self.model.rotary, self.model.dtype)
        kv = self.model.new_kv(rows + following + room)
        if describe := getattr(self.model, "describe", None):  # CoPE: where the prompt's updated slots lie
            describe(kv, slots_in(plan.prompt))
        request = PrefillRequest(
            ids,
            positions,
            kv,
            reused,
            source,
            self.policy.correction,
            tuple(p.length for p in pieces),
        )
        return request, plan, receipt

    def _fetch(self, key: ChunkKey, tokens: int, receipt: Receipt) -> ChunkKV | None:
        for store in (self.store, self.corrected):
            if store is not None:
                try:
                    found = store.fetch(key, shape=self.encoder.shape, tokens=tokens)
                except StoreError as broken:
                    found = Fetched(None, why=str(broken))
                if found.chunk is not None:
                    return found.chunk
                if found.why != "absent":  # a damaged chunk is recomputed, never served
                    receipt.fallback = found.why
        return None

    def _finish(self, request: PrefillRequest, plan: Plan, receipt: Receipt, output: PrefillOutput) -> Prefilled:
        receipt.tokens_recomputed = len(output.selected)
        receipt.tokens_reused = len(request.reused) - len(output.selected)
        receipt.tokens_per_layer = output.tokens_computed
        receipt.compute_fraction = output.compute_fraction(receipt.tokens)
        receipt.alpha = output.alpha
        logits = None if output.hidden is None else self.model.logits(output.hidden[None])[0]
        return Prefilled(request.kv, receipt.tokens, plan.positions[-1] + 1, logits, receipt, output, plan)

    def extend(self, state: Prefilled, token_ids: Sequence[int]) -> Tensor:
        """Append tokens behind `state`; returns the last one's logits [vocab_size]. See `extend_batch`."""
        return self.extend_batch([state], [token_ids])[0]

    @torch.inference_mode()
    def extend_batch(self, states: Sequence[Prefilled], token_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """Append tokens behind every state (computed exactly over its KV), packed; the last ones' logits [vocab_size].

        `length` and `next_position` of the states move on; set them back to try another continuation.
        """
        requests = []
        for state, new in zip(states, token_ids, strict=True):
            ids = torch.tensor(new, device=self.model.device)
            positions = torch.arange(state.next_position, state.next_position + len(ids), device=ids.device)
            requests.append(PrefillRequest(ids, positions, state.kv, rows_none(ids), start=state.length))
        outputs = self.executor.run(requests)
        for state, new in zip(states, token_ids, strict=True):
            state.length += len(new)
            state.next_position += len(new)
        return list(self.model.logits(torch.stack([out.hidden for out in outputs])))

    def generate(self, state: Prefilled, logits: Tensor, max_new_tokens: int, stop: frozenset[int]) -> list[int]:
        """Greedy continuation of at most `max_new_tokens` ids, up to and without the first id in `stop`."""
        out: list[int] = []
        while len(out) < max_new_tokens:
            token = int(logits.argmax())
            if token in stop:
                break
            out.append(token)
            if len(out) < max_new_tokens:
                logits = self.extend(state, [token])
        return out
