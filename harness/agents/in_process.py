"""The reference backend as a completer: any system, one store for all sessions, requests packed or one by one."""

import time
from collections.abc import Sequence

from cacheslide.core.engine import ReuseEngine
from cacheslide.policies.base import ReusePolicy
from cacheslide.store.base import ChunkStore
from harness.agents.completer import Completion, Request
from harness.backends import client
from harness.backends.beams import beam_search
from harness.backends.reference import EngineSettings, ReferenceBackend
from harness.backends.reference_client import ReferenceClient


class InProcess:
    """Serves agents under one policy; the parameters are those of `ReferenceClient`."""

    def __init__(
        self,
        backend: ReferenceBackend,
        policy: ReusePolicy,
        store: ChunkStore | None = None,
        settings: EngineSettings | None = None,
        generations: int = 0,
    ) -> None:
        self.backend, self.system, self.generations = backend, policy.name, generations
        self.client = ReferenceClient(backend, policy, store, settings, generations)

    @property
    def engine(self) -> ReuseEngine:
        """The engine of the policy."""
        return self.client.engine

    def complete(self, request: Request) -> Completion:
        """Greedy; ends at the end of sequence, a line break, or the first of the request's stop texts."""
        return self.complete_batch([request])[0]

    def complete_batch(self, requests: Sequence[Request]) -> list[Completion]:
        """Several requests prefilled in one packed run and decoded in packed steps; each is timed from the start."""
        prompts, stop = [self.backend.prompt(r.segments) for r in requests], self.backend.stop_ids()
        asked = [
            client.Request(r.id, prompt, r.max_tokens, stop=r.stop, stop_ids=stop)
            for r, prompt in zip(requests, prompts, strict=True)
        ]
        return [Completion.of(*done) for done in zip(self.client.packed(asked), prompts, strict=True)]

    def beam(self, request: Request, width: int) -> Completion:
        """The best of `width` beams over one prefill; the first token's time is that of the first `width` beams."""
        prompt, stop = self.backend.prompt(request.segments), self.backend.stop_ids()
        done = client.Result(request.id, time.perf_counter())
        state = self.engine.prefill(prompt, room=width * request.max_tokens)
        beams, done.token_times = beam_search(self.backend.model, state, state.logits, width, request.max_tokens, stop)
        done.token_ids, done.finished = list(beams[0].token_ids), time.perf_counter()
        done.text = client.before(self.client.text(done.token_ids), request.stop)
        done.receipt = self.client.retain(self.engine, prompt, state)
        return Completion.of(done, prompt)
