"""The reference backend as a completer: any system, one store for all sessions, requests packed or one by one."""

import time
from collections.abc import Sequence

from torch import Tensor

from cacheslide.core.engine import Prefilled
from cacheslide.core.greedy import greedy
from cacheslide.core.prompt import Prompt
from cacheslide.policies.base import ReusePolicy
from cacheslide.store.base import ChunkStore
from cacheslide.store.memory import MemoryChunkStore
from harness.agents.completer import Completion, Request
from harness.backends.beams import beam_search
from harness.backends.reference import EngineSettings, ReferenceBackend


class InProcess:
    """Serves agents under one policy.

    After each answer the chunks that its prompt lacked are retained, as a server does between requests: the next turn
    finds them. That work is not in the request's times; the receipt counts it (`chunks_built`, `chunks_copied`,
    `build_s`, and `build_row_layers`, rows computed once a layer).

    Parameters
    ----------
    backend : ReferenceBackend
    policy : ReusePolicy
    store : ChunkStore, optional
    settings : EngineSettings, optional
    generations : int
        How many generations from exact KV a chunk may be that is copied from the KV that serving left
        (`ReuseEngine.retain`). With 0 every chunk is exact: copied where nothing was reused, encoded otherwise.
    """

    def __init__(
        self,
        backend: ReferenceBackend,
        policy: ReusePolicy,
        store: ChunkStore | None = None,
        settings: EngineSettings | None = None,
        generations: int = 0,
    ) -> None:
        self.backend, self.system, self.generations = backend, policy.name, generations
        corrected = MemoryChunkStore() if generations else None
        self.engine = backend.engine(
            policy, store or MemoryChunkStore(), settings or EngineSettings(), corrected=corrected
        )

    def complete(self, request: Request) -> Completion:
        """Greedy; ends at the end of sequence, a line break, or the first of the request's stop texts."""
        return self.complete_batch([request])[0]

    def complete_batch(self, requests: Sequence[Request]) -> list[Completion]:
        """Several requests prefilled in one packed run and decoded in packed steps; each is timed from the start."""
        prompts = [self.backend.prompt(r.segments) for r in requests]
        begin = time.perf_counter()
        states = self.engine.prefill_batch(prompts, room=max(r.max_tokens for r in requests))
        times: list[list[float]] = [[] for _ in requests]

        def advance(active: list[int], tokens: list[int]) -> list[Tensor]:
            return self.engine.extend_batch([states[i] for i in active], [[t] for t in tokens])

        def chosen(active: list[int]) -> None:
            now = time.perf_counter() - begin
            for i in active:
                times[i].append(now)

        most, stop = [r.max_tokens for r in requests], self.backend.stop_ids()
        ids = greedy([s.logits for s in states], most, stop, advance, chosen)
        out = []
        for i, (request, prompt, state) in enumerate(zip(requests, prompts, states, strict=True)):
            text = self._text(ids[i], request)
            receipt = self._retain(prompt, state)
            sent = tuple(s.token_ids for s in prompt.segments)
            out.append(Completion(text, sent, tuple(ids[i]), tuple(times[i]), times[i][-1], receipt))
        return out

    def beam(self, request: Request, width: int) -> Completion:
        """The best of `width` beams over one prefill; the first token's time is that of the first `width` beams."""
        prompt = self.backend.prompt(request.segments)
        begin = time.perf_counter()
        state = self.engine.prefill(prompt, room=width * request.max_tokens)
        found, times = beam_search(
            self.backend.model, state, state.logits, width, request.max_tokens, self.backend.stop_ids()
        )
        ids, total = found[0].token_ids, time.perf_counter() - begin
        sent = tuple(s.token_ids for s in prompt.segments)
        token_s = tuple(t - begin for t in times)
        return Completion(self._text(ids, request), sent, tuple(ids), token_s, total, self._retain(prompt, state))

    def _text(self, ids: Sequence[int], request: Request) -> str:
        text = self.backend.tokenizer.decode(list(ids), skip_special_tokens=True)
        for mark in request.stop:
            text = text.split(mark, 1)[0]
        return text

    def _retain(self, prompt: Prompt, state: Prefilled) -> dict:
        """Keep the prompt's chunks for later turns; the request's receipt."""
        receipt, computed, begin = state.receipt.as_dict(), self.engine.encoder.row_layers, time.perf_counter()
        retained = self.engine.retain(state, prompt, self.generations)
        receipt |= {"chunks_built": retained.encoded, "chunks_copied": retained.copied}
        receipt["build_s"] = time.perf_counter() - begin
        receipt["build_row_layers"] = self.engine.encoder.row_layers - computed
        return receipt
