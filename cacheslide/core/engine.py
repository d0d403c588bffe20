"""The reuse engine of the reference host: plans a prompt, fills the store, prefills, and reports in a receipt."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cacheslide.core.encoder import ChunkEncoder
from cacheslide.core.greedy import greedy
from cacheslide.core.keys import CacheIdentity, ChunkKey
from cacheslide.core.learning import learn
from cacheslide.core.plan import Plan, make_plan
from cacheslide.core.prefill_request import PrefillOutput, PrefillRequest
from cacheslide.core.prompt import Prompt
from cacheslide.core.receipt import Receipt
from cacheslide.core.refreshing import refreshed, unscored
from cacheslide.core.remembering import TokenKV
from cacheslide.core.request_builder import Found, RequestBuilder, find_pieces
from cacheslide.core.retention import generation_of_copy
from cacheslide.core.selective_prefill import SelectivePrefill
from cacheslide.errors import PromptError, StoreError
from cacheslide.models.adapter import ModelAdapter
from cacheslide.policies.base import ReusePolicy
from cacheslide.positions.ccpe import slots_in
from cacheslide.store.base import ChunkKV, ChunkStore, Fetched


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
    found: Found | None = None  # the reused rows, for refreshing their scores; None where the rule needs none


@dataclass(frozen=True)
class Retained:
    """Result of `ReuseEngine.retain`: chunks copied from a request's KV at `generation`, or encoded exactly.

    `refreshed` counts chunks already stored that got new scores.
    """

    copied: int = 0
    encoded: int = 0
    generation: int = 0
    refreshed: int = 0


class ReuseEngine:
    """Serves prompts under one policy.

    Parameters
    ----------
    model : ModelAdapter
    policy : ReusePolicy
    store : ChunkStore
    chunk_size : int
        Maximum tokens of a chunk; fixed segments are cut into such chunks.
    suffix_len : int
        This many tokens at the prompt's end are always recomputed; at least 1 where logits are needed.
    namespace : str
        Chunks are never shared between namespaces (tenants).
    corrected : ChunkStore, optional
        Where `retain` puts KV that was computed over reused KV. It is read only where `store` lacks a chunk, so an
        exact copy takes precedence and a corrected one is never taken for a chunk's reference copy.
    max_deviation : float
        Under a rule that needs scores: `retain` encodes a chunk anew when its recomputed tokens deviate by more than
        this in the mean. Infinite by default: never.
    """

    def __init__(
        self,
        model: ModelAdapter,
        policy: ReusePolicy,
        store: ChunkStore,
        *,
        chunk_size: int = 1024,
        suffix_len: int = 1,
        namespace: str = "",
        store_dtype: torch.dtype | None = None,
        capture: frozenset[int] = frozenset(),
        corrected: ChunkStore | None = None,
        max_deviation: float = math.inf,
    ) -> None:
        if suffix_len < 1:
            raise PromptError(f"suffix_len must be at least 1, not {suffix_len}")
        self.model, self.policy, self.store, self.corrected = model, policy, store, corrected
        if not max_deviation >= 0:
            raise PromptError(f"max_deviation must be at least 0, not {max_deviation}")
        self.chunk_size, self.suffix_len, self.max_deviation = chunk_size, suffix_len, max_deviation
        store_dtype = store_dtype or model.dtype
        self.identity = CacheIdentity(model.model_id, str(store_dtype), namespace=namespace)
        captured = capture | policy.probe_layers
        self.encoder = ChunkEncoder(model, store, store_dtype, captured, policy.needs_scores, policy.memory)
        self.builder, self.executor = RequestBuilder(model), SelectivePrefill(model)

    def plan(self, prompt: Prompt) -> Plan:
        """Positions, chunks and keys of `prompt`; touches neither model nor store."""
        return make_plan(self.policy, self.identity, prompt, self.chunk_size, self.model.max_positions)

    def build(self, prompt: Prompt) -> int:
        """Compute and store the chunks of `prompt` that the store lacks; returns their number."""
        plan = self.plan(prompt)
        if not plan.chunks:
            return 0
        return self.encoder.encode(self.policy.encoding, plan)

    @torch.inference_mode()
    def retain(self, state: Prefilled, prompt: Prompt, limit: int) -> Retained:
        """Store the chunks of `prompt` that no store has, from the KV that serving it left in `state`.

        A copy computes nothing but carries the error of the reused rows it was computed over: its generation is one
        more than the highest among the reused chunks. Beyond `limit` generations the chunks are encoded exactly
        instead, and so are those of encodings other than "in_prompt". With an exact keying copies are exact.

        Under a rule that needs scores, reused chunks are refreshed first (`refresh`). Those past `max_deviation` are
        encoded anew in this prompt together with the missing ones, and replace the stored ones in a store with
        `replace`. Only encodings "in_prompt" do so: any other context would give the same KV again. Exact chunks are
        scored against their other context (`Contrast`), which takes a prefill; a corrected copy inherits the scores of
        the chunk that its rows were reused from, or has none. Chunks stored without scores get them, in memory, when
        others are encoded at the same time (that prefill is then done anyway); otherwise they stay unscored and the
        rule treats their tokens as unknown. In vLLM a separate job scores them (`vllm/worker/scoring.py`).

        Parameters
        ----------
        prompt : Prompt
            The prompt that was served. Its fixed segments may extend over generated text: the rows of `state` behind
            the prompt, without the last generated token, which has no KV yet.
        limit : int
            Highest generation of a copy, 0 or more.
        """
        if limit < 0:
            raise PromptError(f"a limit of generations is at least 0, not {limit}")
        plan = self.plan(prompt)
        if not state.receipt.chunks_hit:
            learn(self.model, self.policy.memory, self.store, state.plan, state.kv, self.encoder.shape)
        count, past = self._refresh(state)
        anew = past & set(plan.keys) if self.policy.encoding.in_prompt else frozenset()
        if not plan.chunks or (not anew and all(map(self._has, plan.keys))):
            return Retained(refreshed=count)
        generation = generation_of_copy(
            self.policy,
            exact=state.receipt.chunks_hit == 0,
            oldest=state.receipt.generation,
            limit=limit if self.corrected is not None else 0,
            in_place=not self.encoder.capture and self._holds(state, plan),
        )
        if generation is None or anew:
            served = state.kv if state.receipt.chunks_hit == 0 and self._holds(state, plan) else None
            lacking = unscored(state.found, state.plan)
            encoded = self.encoder.encode(self.policy.encoding, plan, served, anew, lacking)
            return Retained(encoded=encoded, refreshed=count)
        store = self.corrected if generation else self.store
        contrast = self.encoder.contrast(self.policy.encoding, plan) if self.policy.needs_scores else None
        missing = [i for i, key in enumerate(plan.keys) if not self._has(key)]
        for number in missing:
            chunk, scores = plan.chunks[number], None
            if contrast is not None and not generation:
                own = TokenKV.of_rows(state.kv, plan.positions, chunk.start, chunk.end, self.model.device)
                scores = contrast.scores(number, own)
            elif generation and state.found is not None:
                scores = state.found.scores_of(chunk.start, chunk.end)
            copy = self.encoder.cut(state.kv, plan.positions, chunk.start, chunk.end, generation)
            store.put(plan.keys[number], replace(copy, scores=scores))
        return Retained(len(missing), 0, generation, count)

    @torch.inference_mode()
    def refresh(self, state: Prefilled) -> int:
        """Rescore the chunks reused for `state` from the tokens it recomputed; returns the number of chunks.

        Computes no KV, only deviations between the recomputed KV and the stored KV. Does nothing under a rule that
        needs no scores. Chunks in memory get the new scores; files and servers keep the scores they were written with.
        """
        return self._refresh(state)[0]

    def _refresh(self, state: Prefilled) -> tuple[int, frozenset[ChunkKey]]:
        """Number of rescored chunks, and the keys of those that deviate by more than `max_deviation`."""
        if state.found is None:
            return 0, frozenset()
        keys, count, past = {c.start: key for key, c in state.plan.keyed}, 0, set()
        for new in refreshed(self.model, state.found, state.output.selected, state.kv, state.plan.positions):
            key = keys[new.start]
            store = self.corrected if new.chunk.generation and self.corrected is not None else self.store
            count += store.rescore(key, new.scores, new.chunk)
            if new.mean > self.max_deviation:
                past.add(key)
        return count, frozenset(past)

    def _has(self, key: ChunkKey) -> bool:
        return self.store.contains(key) or (self.corrected is not None and self.corrected.contains(key))

    def _holds(self, state: Prefilled, plan: Plan) -> bool:
        """Whether the KV of `state` is that of the plan's chunks in this prompt."""
        served, rows = state.plan, len(state.plan.prompt)
        equal = plan.prompt.token_ids[:rows] == served.prompt.token_ids[: len(plan.prompt)]
        equal = equal and plan.positions[:rows] == served.positions[: len(plan.prompt)]
        behind, last = plan.positions[rows:], served.positions[-1]  # generated text follows directly
        equal = equal and list(behind) == list(range(last + 1, last + 1 + len(behind)))
        return equal and plan.chunks[-1].end <= state.length

    def prefill(self, prompt: Prompt, following: int = 0, room: int = 0) -> Prefilled:
        """Complete the KV of `prompt`, reusing what the store holds. See `prefill_batch`."""
        return self.prefill_batch([prompt], following, room)[0]

    @torch.inference_mode()
    def prefill_batch(self, prompts: Sequence[Prompt], following: int = 0, room: int = 0) -> list[Prefilled]:
        """Complete the KV of several prompts in one packed run.

        `following` tokens will be appended with `extend` before anything is generated: they count towards `suffix_len`,
        so that prefilling a context first and a question later reuses the same rows as prefilling both at once. The KV
        buffer has `room` more rows, for generated tokens.
        """
        prepared = [self._prepare(p, following, room) for p in prompts]
        outputs = self.executor.run([request for request, _, _ in prepared])
        return [self._finish(*p, output) for p, output in zip(prepared, outputs, strict=True)]

    def _prepare(self, prompt: Prompt, following: int, room: int) -> tuple[PrefillRequest, Plan, Receipt]:
        plan = self.plan(prompt)
        rows = len(plan.prompt)
        receipt = Receipt(self.policy.name, rows, chunks=len(plan.chunks))
        limit = rows - max(0, self.suffix_len - following)
        cached = find_pieces(plan.keyed, 0, limit, lambda _, key, c: self._fetch(key, len(c), receipt), receipt)
        if cached.pieces and self.policy.memory.name:
            cached, why = self.policy.memory.recall(self.model, plan, cached)
            receipt.chunks_hit, receipt.fallback = len(cached.pieces), why or receipt.fallback
        if plan.chunks and not cached.pieces and not receipt.fallback:
            receipt.fallback = "no chunk of this prompt is in the store"
        request = self.builder.build(
            plan.prompt.token_ids,
            plan.positions,
            self.model.new_kv(rows + following + room),
            found=cached,
            placement=self.policy.placement,
            correction=self.policy.correction,
            slots=slots_in(plan.prompt),
        )
        return request, plan, receipt

    def _fetch(self, key: ChunkKey, tokens: int, receipt: Receipt) -> ChunkKV | None:
        """A chunk of `tokens` tokens from the first store that has it; else None, with the reason in the receipt."""
        for store in (self.store, self.corrected):
            if store is not None:
                try:
                    fetched = store.fetch(key, shape=self.encoder.shape, tokens=tokens)
                except StoreError as broken:
                    fetched = Fetched(None, why=str(broken))
                if fetched.chunk is not None:
                    return fetched.chunk
                if fetched.why != "absent":  # a damaged chunk is recomputed
                    receipt.fallback = fetched.why
        return None

    def _finish(self, request: PrefillRequest, plan: Plan, receipt: Receipt, output: PrefillOutput) -> Prefilled:
        receipt.complete(output, len(request.reused))
        reused = Found.of(request) if self.policy.needs_scores else None
        logits = None if output.hidden is None else self.model.logits(output.hidden[None])[0]
        return Prefilled(request.kv, receipt.tokens, plan.positions[-1] + 1, logits, receipt, output, plan, reused)

    def extend(self, state: Prefilled, token_ids: Sequence[int]) -> Tensor:
        """Append tokens behind `state`; returns the last one's logits [vocab_size]. See `extend_batch`."""
        return self.extend_batch([state], [token_ids])[0]

    @torch.inference_mode()
    def extend_batch(self, states: Sequence[Prefilled], token_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """Compute tokens exactly over each state's KV, packed; returns each one's last logits [vocab_size].

        Advances `length` and `next_position` of the states; reset them to try another continuation.
        """
        requests = []
        for state, new in zip(states, token_ids, strict=True):
            positions = range(state.next_position, state.next_position + len(new))
            requests.append(self.builder.build(new, positions, state.kv, start=state.length))
        outputs = self.executor.run(requests)
        for state, new in zip(states, token_ids, strict=True):
            state.length += len(new)
            state.next_position += len(new)
        return list(self.model.logits(torch.stack([out.hidden for out in outputs])))

    @torch.inference_mode()
    def score(self, state: Prefilled, token_ids: Sequence[int]) -> Tensor:
        """Logits [n, vocab_size] that predict each of `token_ids` [n] behind `state`, which is unchanged.

        Overwrites rows of the KV buffer behind `state.length`, which needs room for n - 1 of them. PromptError without
        tokens.
        """
        if not token_ids:
            raise PromptError("there are no tokens to score")
        ahead, parts = token_ids[:-1], [state.logits[None]]
        if ahead:
            positions = range(state.next_position, state.next_position + len(ahead))
            [out] = self.executor.run([self.builder.build(ahead, positions, state.kv, start=state.length)])
            parts.append(self.model.logits(out.final))
        return torch.cat(parts)

    def generate(self, state: Prefilled, logits: Tensor, max_new_tokens: int, stop: frozenset[int]) -> list[int]:
        """Greedy continuation of at most `max_new_tokens` ids, up to and without the first id in `stop`."""
        [out] = greedy([logits], [max_new_tokens], stop, lambda _, tokens: [self.extend(state, tokens)])
        return out
