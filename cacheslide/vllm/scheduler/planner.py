"""Plans a request on arrival: its annotations, policy, spans found in it, and its prompt's chunks."""

import secrets
from dataclasses import replace

from cacheslide.core.keys import CacheIdentity
from cacheslide.core.plan import make_plan
from cacheslide.errors import CacheSlideError, PolicyError, PromptError
from cacheslide.vllm.geometry import Geometry
from cacheslide.vllm.options import Annotations, ServerOptions
from cacheslide.vllm.scheduler import reasons
from cacheslide.vllm.scheduler.beam_groups import Families
from cacheslide.vllm.scheduler.request_state import Tracked
from cacheslide.vllm.scheduler.span_memory import SpanMemory
from cacheslide.vllm.systems import check_served
from cacheslide.vllm.tenants import tenant_of, unsalted


class Planner:
    """Plans requests, with memories of spans seen before and of current families."""

    def __init__(self, options: ServerOptions, geometry: Geometry) -> None:
        self.options, self.geometry = options, geometry
        self.families = Families()
        self.memory = SpanMemory(options.span_tokens, options.spans_known)

    def plan(self, request) -> Tracked | None:
        """The state to track for vLLM's `request`; None for a request that reuses nothing.

        A request with invalid annotations is computed exactly; it never fails the engine.
        """
        try:
            annotations = Annotations.parse(request.kv_transfer_params) or self._unannotated(request)
            if annotations is None or (annotations.find is False and not annotations.segments):
                return None
            return (
                self._plan(request, annotations) if annotations.family is None else self._member(request, annotations)
            )
        except CacheSlideError as wrong:
            return Tracked(request.num_prompt_tokens, "", reason=str(wrong), retained=True)

    def clear(self) -> None:
        """Clear both memories."""
        self.memory.clear()
        self.families.clear()

    def rename_model(self) -> None:
        """Change the model's name in chunk keys: the same text gets new keys."""
        self.geometry = replace(self.geometry, model_id=f"{self.geometry.model_id} {secrets.token_hex(16)}")

    def _unannotated(self, request) -> Annotations | None:
        """Annotations for a request without any, if the server finds spans itself."""
        sampling = request.sampling_params
        if not self.options.find_spans or sampling is None or request.prompt_token_ids is None:
            return None
        one_beam = sampling.max_tokens == 1 and not sampling.detokenize  # a new request per token: see openai_server.py
        return None if one_beam else Annotations(find=True)

    def _member(self, request, annotations: Annotations) -> Tracked | None:
        """State of a family's first member, planned as any request, or of a later one (None: computed exactly).

        A family has one tenant and one prompt: a request under its name with other tokens, annotations or tenant is
        planned by itself.
        """
        tenant, name = self._tenant(request, annotations), annotations.family["name"]
        family = self.families.get(tenant, name)
        if family is not None and not family.fits(annotations, request.prompt_token_ids):
            return self._plan(request, annotations)
        if family is None or not (family.reason or family.first is not None):
            tracked = self._plan(request, annotations)
            tracked.family = family or self.families.add(tenant, name, tracked, annotations)
            return tracked
        return family.exactly() if family.reason else family.join(request)

    def _tenant(self, request, annotations: Annotations) -> str:
        return tenant_of(self.options.namespace, annotations.namespace, unsalted(request.cache_salt or ""))

    def _plan(self, request, annotations: Annotations) -> Tracked:
        if annotations.find and self.geometry.slots:
            raise PromptError("spans that are looked for follow no template, which calibrated slot offsets (CCPE) need")
        policy = annotations.system(self.options)
        check_served(policy, self.geometry.num_layers)
        tenant = self._tenant(request, annotations)
        if annotations.find:
            rows = annotations.family and annotations.family["rows"]
            annotations = replace(
                annotations, segments=tuple(self.memory.match(tenant, request.prompt_token_ids[:rows]))
            )
        prompt = annotations.prompt(request.prompt_token_ids)
        if policy.transform(prompt) != prompt:
            raise PolicyError(f"{policy.name} rewrites prompts: apply its transform before sending")
        identity = CacheIdentity(self.geometry.model_id, self.geometry.dtype, namespace=tenant)
        plan = make_plan(policy, identity, prompt, self.options.chunk_size, self.geometry.max_positions)
        tracked = Tracked(len(prompt), policy.name, policy=policy, plan=plan, identity=identity)
        tracked.slots = self.geometry.slots_of(prompt)
        tracked.encode = annotations.encode or self.options.encode
        tracked.spans, tracked.history, tracked.note = annotations.segments, annotations.history, annotations.note
        tracked.last, tracked.schema = annotations.release, plan.schema
        sampling = request.sampling_params
        if sampling is not None and sampling.prompt_logprobs is not None:
            tracked.reason = reasons.PROMPT_LOGPROBS
        elif not plan.chunks:
            nothing = f"{policy.name} reuses nothing of this prompt"
            tracked.reason = reasons.NOT_SEEN if annotations.find and policy.reuses else annotations.note or nothing
        elif tracked.schema:
            request.skip_reading_prefix_cache = True  # shared blocks hold keys at positions other than the schema's
        return tracked
