"""The reference engine as a client: packed prefills and decoding steps, stored chunks."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cacheslide.core.engine import Prefilled, ReuseEngine
from cacheslide.core.greedy import greedy
from cacheslide.core.prompt import Prompt
from cacheslide.core.tokenizing import opening
from cacheslide.errors import CacheSlideError, ConfigError, PromptError
from cacheslide.plain_values import check_plain, shown
from cacheslide.policies.base import ReusePolicy
from cacheslide.store.base import ChunkStore
from cacheslide.store.memory import MemoryChunkStore
from cacheslide.vllm.options import Annotations, policy_of
from cacheslide.vllm.tenants import tenant_of
from harness.backends.client import Client, Request, Result, at_once, before
from harness.backends.reference import EngineSettings, ReferenceBackend


class ReferenceClient(Client):
    """One `ReuseEngine` per requested policy, over one model and one store.

    After each answer the missing chunks of its prompt are stored, as a server does between requests, for the next turn.
    That work is not in the request's times; the receipt counts it (`chunks_built`, `chunks_copied`, `build_s`, and
    `build_row_layers`, the sum of rows over layers). Generated text is not stored, whatever `history` says.

    Parameters
    ----------
    backend : ReferenceBackend
    policy : ReusePolicy
        Policy of requests that name none.
    store : ChunkStore, optional
    settings : EngineSettings, optional
    generations : int or None
        Highest generation of chunks copied from the KV that serving left (`ReuseEngine.retain`). With 0 every chunk is
        exact: copied if nothing was reused, otherwise encoded. None stores nothing.
    """

    def __init__(
        self,
        backend: ReferenceBackend,
        policy: ReusePolicy,
        store: ChunkStore | None = None,
        settings: EngineSettings | None = None,
        generations: int | None = 0,
    ) -> None:
        self.backend, self.policy, self.generations = backend, policy, generations
        self.settings, self.store = settings or EngineSettings(), MemoryChunkStore() if store is None else store
        self._open()

    def _open(self) -> None:
        self.corrected = MemoryChunkStore() if self.generations else None
        self._engines: dict[tuple, ReuseEngine] = {}
        self.engine = self._engine((None, None, None), "")

    def run(self, requests: Sequence[Request], clients: int | None = None) -> list[Result]:
        """See `Client.run`. Served in rounds: `clients` requests in one packed run, then the next ones."""
        step, out = at_once(requests, clients), []
        for at in range(0, len(requests), step or 1):
            out += self._round(requests[at : at + step])
        return out

    def _round(self, requests: Sequence[Request]) -> list[Result]:
        """One packed run; if a request is refused, each is served alone, so that only that one fails."""
        began = time.perf_counter()
        try:
            return self.packed(requests)
        except CacheSlideError as refused:
            if len(requests) > 1:
                return [result for request in requests for result in self._round([request])]
            failed = Result(requests[0].id, began, time.perf_counter(), labels=dict(requests[0].labels))
            failed.fail(refused)
            return [failed]

    def packed(self, requests: Sequence[Request]) -> list[Result]:
        """Results of one packed run, timed from its start; a refused request raises CacheSlideError.

        Requests of different systems, tenants or stop ids are separate runs, one after the other.
        """
        served = [self._resolve(r) for r in requests]
        sent = time.perf_counter()
        runs: dict[tuple, list[int]] = {}
        for i, one in enumerate(served):
            runs.setdefault((one.key, one.stop), []).append(i)
        results = [Result(r.id, sent, labels=dict(r.labels)) for r in requests]
        states: dict[int, Prefilled] = {}
        for (_, stop), members in runs.items():
            own = self._complete([served[i] for i in members], [results[i] for i in members], stop)
            states |= zip(members, own, strict=True)
        for i, (one, result) in enumerate(zip(served, results, strict=True)):
            if one.kept:
                result.receipt = self.retain(self._engine(*one.key), one.prompt, states[i])
            elif one.annotated:
                result.receipt = states[i].receipt.as_dict()
        return results

    def _resolve(self, request: Request) -> "_Served":
        """A request's prompt and engine; PromptError for options that this host does not support."""
        most, stops = request.max_tokens, request.stop
        if type(most) is not int or most < 1:
            raise PromptError(f"max_tokens must be a count of at least 1, not {shown(most)}")
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise PromptError(f"stop must be texts of at least one character, not {shown(stops)}")
        annotations, prompt = Annotations.parse(request.params), request.prompt
        if annotations is not None and annotations.find:
            raise PromptError("the reference engine looks for no spans: give them as segments")
        annotated = annotations is not None or isinstance(prompt, Prompt)
        if isinstance(prompt, str):
            check_plain(prompt, PromptError, "prompt", text=True)
            prompt = [*opening(self.backend.tokenizer), *self.backend.encode(prompt)]
        if not isinstance(prompt, Prompt):
            prompt = Prompt.from_spans(prompt, ()) if annotations is None else annotations.prompt(prompt)
        if (highest := max(prompt.token_ids)) >= self.backend.vocab_size:
            raise PromptError(f"token id {highest} is not in the model's vocabulary of {self.backend.vocab_size}")
        annotations = annotations or Annotations()
        choice = annotations.policy, annotations.recompute_ratio, annotations.layer
        tenant = (
            tenant_of("", annotations.namespace, request.salt or "") if annotations.namespace or request.salt else ""
        )
        stop = request.stop_ids | (frozenset() if request.ignore_eos else self.backend.eos_ids())
        return _Served(request, prompt, (choice, tenant), stop, annotated, annotated and annotations.encode != "off")

    def _engine(self, choice: tuple[str | None, float | None, int | None], tenant: str) -> ReuseEngine:
        """The engine for (policy, recompute ratio, selection layer); None means the default."""
        if (choice, tenant) not in self._engines:
            default = all(value is None for value in choice)
            policy = self.policy if default else policy_of(choice[0] or self.policy.name, *choice[1:])
            self._engines[choice, tenant] = self.backend.engine(
                policy, self.store, self.settings, corrected=self.corrected, namespace=tenant
            )
        return self._engines[choice, tenant]

    def _complete(
        self, served: Sequence["_Served"], results: Sequence[Result], stop: frozenset[int]
    ) -> list[Prefilled]:
        """Prefill and decode requests of one engine with equal stops; returns their states."""
        engine, most = self._engine(*served[0].key), [one.request.max_tokens for one in served]
        states = engine.prefill_batch([one.prompt for one in served], room=max(most))
        for state, tokens in zip(states, most, strict=True):
            if state.next_position + tokens > self.backend.model.max_positions:  # a schema leaves gaps
                raise PromptError(f"the model has no {tokens} positions behind {state.next_position}")
        latest = [s.logits for s in states]

        def advance(active: list[int], tokens: list[int]) -> list[Tensor]:
            rows = engine.extend_batch([states[i] for i in active], [[t] for t in tokens])
            for i, row in zip(active, rows, strict=True):
                latest[i] = row
            return rows

        def chosen(active: list[int]) -> None:
            now = time.perf_counter()
            for i in active:
                results[i].token_times.append(now)

        ids = greedy(tuple(latest), most, stop, advance, chosen)
        for one, result, state, own, logits in zip(served, results, states, ids, latest, strict=True):
            if len(result.token_times) > len(own):
                result.stop_id = int(logits.argmax())
            self._answer(one.request, result, own)
            result.prompt_tokens = state.receipt.tokens
        return states

    def _answer(self, request: Request, result: Result, ids: list[int]) -> None:
        """Set the answer `ids`, cut at the token that completes a stop text."""
        text = self.text(ids)
        result.text = before(text, request.stop)
        if result.text != text:
            texts = (self.text(ids[:n]) for n in range(1, len(ids) + 1))
            length = next(n for n, t in enumerate(texts, 1) if any(end in t for end in request.stop))
            ids, result.stop_id = ids[:length], None
            del result.token_times[length:]
        stopped = result.stop_id is not None or result.text != text
        result.token_ids, result.finish_reason = ids, "stop" if stopped else "length"
        result.tokens, result.finished = len(result.token_times), result.token_times[-1]

    def text(self, ids: Sequence[int]) -> str:
        """The text of generated ids, not stripped."""
        return self.backend.tokenizer.decode(list(ids), skip_special_tokens=True)

    def retain(self, engine: ReuseEngine, prompt: Prompt, state: Prefilled) -> dict[str, Any]:
        """Store the chunks of a served prompt for later requests; returns its receipt including that work."""
        receipt = state.receipt.as_dict()
        if self.generations is None:
            return receipt
        computed, begin = engine.encoder.row_layers, time.perf_counter()
        retained = engine.retain(state, prompt, self.generations)
        receipt |= {"chunks_built": retained.encoded, "chunks_copied": retained.copied}
        receipt["build_s"] = time.perf_counter() - begin
        receipt["build_row_layers"] = engine.encoder.row_layers - computed
        return receipt

    def reset(self) -> None:
        """Drop all chunks; ConfigError if the store is not in this client's memory."""
        if not isinstance(self.store, MemoryChunkStore):
            raise ConfigError("the chunks of a store outside of this client's memory are not its own to forget")
        self.store = MemoryChunkStore()
        self._open()

    def close(self) -> None:
        """Does nothing: the store and the model belong to the caller."""


@dataclass(frozen=True)
class _Served:
    """A request with its prompt and its engine's key; `annotated`: gets a receipt, `kept`: its chunks are stored."""

    request: Request
    prompt: Prompt
    key: tuple[tuple[str | None, float | None, int | None], str]
    stop: frozenset[int]
    annotated: bool
    kept: bool
