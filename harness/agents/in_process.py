"""The reference backend as a completer: any system, one store for all sessions."""

import time

from cacheslide.policy import ReusePolicy
from cacheslide.store.base import ChunkStore
from cacheslide.store.memory import MemoryChunkStore
from harness.agents.completer import Completion, Request
from harness.backend import EngineSettings, ReferenceBackend


class InProcess:
    """Serves agents under one policy.

    After each answer the chunks that its prompt lacked are built and stored, as a server does between requests: the
    next turn finds them. That work is not in the request's times; the receipt counts it (`chunks_built`, `build_s`).
    """

    def __init__(
        self,
        backend: ReferenceBackend,
        policy: ReusePolicy,
        store: ChunkStore | None = None,
        settings: EngineSettings | None = None,
    ) -> None:
        self.backend, self.system = backend, policy.name
        self.engine = backend.engine(policy, store or MemoryChunkStore(), settings or EngineSettings())

    def complete(self, request: Request) -> Completion:
        """Greedy; ends at the end of sequence, a line break, or the first of the request's stop texts."""
        prompt = self.backend.prompt(request.segments)
        begin = time.perf_counter()
        state = self.engine.prefill(prompt, room=request.max_tokens)
        ids, times, logits, stop = [], [], state.logits, self.backend.stop_ids()
        while len(ids) < request.max_tokens:
            token = int(logits.argmax())
            times.append(time.perf_counter() - begin)
            if token in stop:
                break
            ids.append(token)
            if len(ids) < request.max_tokens:
                logits = self.engine.extend(state, [token])
        total = time.perf_counter() - begin
        text = self.backend.tokenizer.decode(ids, skip_special_tokens=True)
        for mark in request.stop:
            text = text.split(mark, 1)[0]
        receipt = state.receipt.as_dict()
        begin = time.perf_counter()
        receipt["chunks_built"] = self.engine.build(prompt)
        receipt["build_s"] = time.perf_counter() - begin
        sent = tuple(s.token_ids for s in prompt.segments)
        return Completion(text, sent, tuple(ids), tuple(times), total, receipt)
