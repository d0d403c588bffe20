"""What a request may reuse, decided when it arrives: its marks, its policy, spans found in it, its prompt's chunks."""

import secrets
from dataclasses import replace

from cacheslide.core.keys import CacheIdentity
from cacheslide.core.plan import make_plan
from cacheslide.errors import CacheSlideError, PolicyError, PromptError
from cacheslide.vllm.geometry import Geometry
from cacheslide.vllm.options import Marks, ServerOptions
from cacheslide.vllm.scheduler import reasons
from cacheslide.vllm.scheduler.beam_groups import Families
from cacheslide.vllm.scheduler.request_state import Tracked
from cacheslide.vllm.scheduler.span_memory import SpanMemory
from cacheslide.vllm.tenants import tenant_of, unsalted


class Planner:
    """Plans requests, and remembers what helps with later ones: spans that were seen, families under way."""

    def __init__(self, options: ServerOptions, geometry: Geometry) -> None:
        self.options, self.geometry = options, geometry
        self.families = Families()
        self.memory = SpanMemory(options.span_tokens, options.spans_known)

    def plan(self, request) -> Tracked | None:
        """What is tracked of vLLM's `request`; None where it is like any request of an engine without reuse.

        Whatever is wrong with its marks makes it exact, never fails the engine.
        """
        try:
            marks = Marks.parse(request.kv_transfer_params) or self._unmarked(request)
            if marks is None or (marks.find is False and not marks.segments):
                return None
            return self._plan(request, marks) if marks.family is None else self._member(request, marks)
        except CacheSlideError as wrong:
            return Tracked(request.num_prompt_tokens, "", reason=str(wrong), kept=True)

    def clear(self) -> None:
        """Forget what earlier requests held."""
        self.memory.clear()
        self.families.clear()

    def rename_model(self) -> None:
        """The same text has chunks of other names from here on."""
        self.geometry = replace(self.geometry, model_id=f"{self.geometry.model_id} {secrets.token_hex(16)}")

    def _unmarked(self, request) -> Marks | None:
        """Marks of a request without any, where the server looks for spans by itself."""
        sampling = request.sampling_params
        if not self.options.find_spans or sampling is None or request.prompt_token_ids is None:
            return None
        one_beam = (
            sampling.max_tokens == 1 and not sampling.detokenize
        )  # a new request each token: see openai_server.py
        return None if one_beam else Marks(find=True)

    def _member(self, request, marks: Marks) -> Tracked | None:
        """A family's first member is planned as any request; a later one follows it (None: exactly, as all of it).

        A family is of one tenant and one prompt: a request with other tokens, marks or another tenant under its name is
        planned alone.
        """
        tenant, name = self._tenant(request, marks), marks.family["name"]
        family = self.families.get(tenant, name)
        if family is not None and not family.fits(marks, request.prompt_token_ids):
            return self._plan(request, marks)
        if family is None or not (family.reason or family.first is not None):
            tracked = self._plan(request, marks)
            tracked.family = family or self.families.add(tenant, name, tracked, marks)
            return tracked
        return family.exactly() if family.reason else family.join(request)

    def _tenant(self, request, marks: Marks) -> str:
        return tenant_of(self.options.namespace, marks.namespace, unsalted(request.cache_salt or ""))

    def _plan(self, request, marks: Marks) -> Tracked:
        if marks.find and self.geometry.slots:
            raise PromptError("spans that are looked for follow no template, which calibrated slot masses (CCPE) need")
        policy = marks.system(self.options.policy)
        policy.check(self.geometry.num_layers)
        tenant = self._tenant(request, marks)
        if marks.find:
            rows = marks.family and marks.family["rows"]
            marks = replace(marks, segments=tuple(self.memory.meet(tenant, request.prompt_token_ids[:rows])))
        prompt = marks.prompt(request.prompt_token_ids)
        if policy.transform(prompt) != prompt:
            raise PolicyError(f"{policy.name} rewrites prompts: apply its transform before sending")
        identity = CacheIdentity(self.geometry.model_id, self.geometry.dtype, namespace=tenant)
        plan = make_plan(policy, identity, prompt, self.options.chunk_size, self.geometry.max_positions)
        tracked = Tracked(len(prompt), policy.name, policy=policy, plan=plan, identity=identity)
        tracked.slots = self.geometry.slots_of(prompt)
        tracked.encode = marks.encode or self.options.encode
        tracked.spans, tracked.history, tracked.note = marks.segments, marks.history, marks.note
        tracked.schema = plan.schema
        sampling = request.sampling_params
        if sampling is not None and sampling.prompt_logprobs is not None:
            tracked.reason = reasons.PROMPT_LOGPROBS
        elif not plan.chunks:
            nothing = f"{policy.name} reuses nothing of this prompt"
            tracked.reason = reasons.NOT_SEEN if marks.find and policy.reuses else marks.note or nothing
        elif tracked.schema:
            request.skip_reading_prefix_cache = True  # shared blocks hold keys at other positions than the schema's
        return tracked
