"""The scheduler's half: what each marked request reuses, what is kept of it, and what its receipt says."""

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cacheslide.engine import make_plan
from cacheslide.errors import CacheSlideError, PolicyError, PromptError
from cacheslide.keys import CacheIdentity
from cacheslide.policy import check_policy
from cacheslide.vllm import reasons
from cacheslide.vllm.cold import ColdChunks
from cacheslide.vllm.cope_slots import SlotRows
from cacheslide.vllm.families import Families
from cacheslide.vllm.geometry import Geometry
from cacheslide.vllm.history import keep_history
from cacheslide.vllm.keeping import ChunkKeeper
from cacheslide.vllm.mailbox import close_box, open_box
from cacheslide.vllm.metrics import ReuseStats
from cacheslide.vllm.params import Marks, ServerOptions
from cacheslide.vllm.plans import LoadPlan, StepPlan, WorkerReport
from cacheslide.vllm.prefix_cache import key_apart, shares_unfilled_blocks
from cacheslide.vllm.receipts import forecast, tiers_of
from cacheslide.vllm.spans import SpanMemory
from cacheslide.vllm.tracked import Tracked


class SchedulerSide:
    """Follows requests and plans steps. `vllm_config` and `geometry` describe the engine it serves."""

    def __init__(self, vllm_config, options: ServerOptions, geometry: Geometry) -> None:
        self.options, self.geometry = options, geometry
        self.block_size = vllm_config.cache_config.block_size
        self.engine_id = vllm_config.kv_transfer_config.engine_id
        self.box = open_box(self.engine_id)
        self.keeper = ChunkKeeper(options, geometry)
        self.index, self.cold = self.keeper.index, None
        if (tiers := options.tiers) is not None:
            ranks = vllm_config.parallel_config.tensor_parallel_size
            self.cold = self.keeper.cold = ColdChunks(tiers, options.namespace, ranks, self.index, geometry)
        self.tracked: dict[str, Tracked] = {}
        self.running: dict[str, Any] = {}  # vLLM's requests that have blocks, marked or not
        self.prefilling: dict[str, None] = {}  # tracked requests whose prompt is not complete yet, in order of arrival
        self.families = Families()
        self.memory = SpanMemory(options.span_tokens, options.spans_known)
        self.stats = ReuseStats()
        self.rows_planned = 0  # claimed in the step being scheduled
        self.forget = False

    # --- a request's way -------------------------------------------------------------------------------------------

    def arrive(self, request) -> None:
        """Plan a marked request. Whatever is wrong with it makes it exact, never fails the engine."""
        rows = request.num_prompt_tokens
        try:
            marks = Marks.parse(request.kv_transfer_params) or self._unmarked(request)
            if marks is None or (marks.find is False and not marks.segments):
                return
            tracked = self._plan(request, marks) if marks.family is None else self._member(request, marks)
        except CacheSlideError as wrong:
            tracked = Tracked(rows, "", reason=str(wrong), kept=True)
        if tracked is None:
            return
        self.tracked[request.request_id] = tracked
        self.prefilling[request.request_id] = None
        if self.cold is not None and not tracked.reason:
            self.cold.look(tracked, tracked.plan.keys)
        if tracked.slots is not None:  # the rows behind the first slot are not those of a request without marks
            secret = tracked.family.secret if tracked.family is not None else None
            key_apart(request, tracked.slots.bounds[0][1] // self.block_size, secret)

    def _unmarked(self, request) -> Marks | None:
        """Marks of a request without any, where the server looks for spans by itself."""
        sampling = request.sampling_params
        if not self.options.find_spans or sampling is None or request.prompt_token_ids is None:
            return None
        one_beam = sampling.max_tokens == 1 and not sampling.detokenize  # a new request each token: see servers.py
        return None if one_beam else Marks(find=True)

    def _member(self, request, marks: Marks) -> Tracked | None:
        """A family's first member is planned as any request; a later one follows it (None: exactly, as all of it)."""
        tenant, name = request.cache_salt or "", marks.family["name"]
        family = self.families.get(tenant, name)
        if family is None or not (family.reason or family.first is not None):
            tracked = self._plan(request, marks)
            tracked.family = family or self.families.add(tenant, name, tracked)
            return tracked
        return family.exactly() if family.reason else family.join(request)

    def _plan(self, request, marks: Marks) -> Tracked:
        if marks.find and self.geometry.slots:
            raise PromptError("spans that are looked for follow no template, which calibrated slot masses (CCPE) need")
        policy = marks.system(self.options.policy)
        check_policy(policy, self.geometry.num_layers)
        tenant = "\0".join((self.options.namespace, marks.namespace, request.cache_salt or ""))
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
        tracked.schema = plan.positions[-1] != len(prompt) - 1
        sampling = request.sampling_params
        if sampling is not None and sampling.prompt_logprobs is not None:
            tracked.reason = reasons.PROMPT_LOGPROBS
        elif not plan.chunks:
            nothing = f"{policy.name} reuses nothing of this prompt"
            tracked.reason = reasons.NOT_SEEN if marks.find and policy.reuses else marks.note or nothing
        elif tracked.schema:
            request.skip_reading_prefix_cache = True  # shared blocks hold keys at other positions than the schema's
        return tracked

    def claim(self, request, computed: int) -> int | None:
        """Rows the worker will complete by reuse beyond the `computed` ones; None to be asked again in a later step."""
        tracked = self.tracked.get(request.request_id)
        if tracked is None or tracked.reason not in reasons.RETRY:
            return 0
        rows = self._claim(request, tracked, computed)
        if rows is not None:
            self._settle(tracked)
        return rows

    def _claim(self, request, tracked: Tracked, computed: int) -> int | None:
        limit = tracked.rows - max(1, self.options.suffix_len)
        wanted = [
            (key, chunk)
            for key, chunk in zip(tracked.plan.keys, tracked.plan.chunks, strict=True)
            if max(chunk.start, computed) < min(chunk.end, limit)
        ]
        if self.cold is not None and self.cold.waits(tracked, wanted):
            return None
        reuse = tuple((key, chunk) for key, chunk in wanted if key in self.index)
        tracked.start, tracked.reuse = computed, reuse
        # Behind the last reused row the text is exact work over completed KV: vLLM does it best itself, together with
        # the last row, for which it reads all weights anyway.
        want = min(limit, max((chunk.end for _, chunk in reuse), default=tracked.rows)) - computed
        if want <= 0 or not reuse:
            stored = any(key in self.index for key in tracked.plan.keys)
            tracked.reason = reasons.NOT_STORED_BEYOND if stored else reasons.NOT_STORED
            if want <= 0:
                tracked.reason = reasons.COVERED
            if tracked.follows and tracked.rows - computed < self.block_size:
                tracked.reason = ""  # the rest is exact work over the family's rows
            elif tracked.family is not None:
                tracked.family.reason = tracked.reason
            return 0
        if tracked.follows and want < self.block_size:  # a block that the first member left open
            tracked.reuse = ()
            return 0
        if self.rows_planned and self.rows_planned + want > self.options.rows_per_step:
            return None
        if shares_unfilled_blocks(request, computed // self.block_size, self.running.values(), self.block_size):
            return None
        tracked.reason = ""
        tracked.generation = max(self.index.generation(key) for key, _ in reuse)
        self.rows_planned += want
        self.index.touch(tracked.plan.keys)
        first, secret = computed // self.block_size, None
        if tracked.family is not None:
            tracked.family.corrected_from(first)
            secret = tracked.family.secret
        key_apart(request, first, secret)
        return want

    def _settle(self, tracked: Tracked) -> None:
        """Whatever the request waited for is loaded in this step, or not needed."""
        if self.cold is not None:
            self.cold.release(tracked)

    def allocated(self, request, external: int) -> None:
        """vLLM gave the request its blocks; `external` of its rows are ours to complete."""
        self.running[request.request_id] = request
        tracked = self.tracked.get(request.request_id)
        if tracked is not None:
            tracked.loading = external > 0
            self.prefilling[request.request_id] = None  # again, when it comes back from a preemption

    def finish(self, request, block_ids: Sequence[int] = ()) -> dict[str, Any] | None:
        """Forget the request, whose rows lie in `block_ids`; returns its receipt, None for one without marks."""
        self.running.pop(request.request_id, None)
        tracked = self.tracked.pop(request.request_id, None)
        self.prefilling.pop(request.request_id, None)
        measured = self.box.pop(request.request_id, None)
        if tracked is None:
            return None
        self._settle(tracked)
        receipt = measured or tracked.receipt or forecast(tracked)
        receipt |= {"generation": 0 if tracked.exact else tracked.generation}
        receipt |= {"tiers": tiers_of(tracked, receipt, self.geometry, self.options.store_device)}
        receipt |= {"store_failures": tracked.below.failures} if tracked.below.failures else {}
        receipt |= {"note": tracked.note} if tracked.note else {}
        if tracked.history is not None and tracked.plan is not None:
            receipt |= {"history": keep_history(self.keeper, request, tracked, list(block_ids))}
        # A family is one request while its blocks last.
        if not tracked.follows or tracked.reuse or tracked.reason not in ("", reasons.AS_FAMILY):
            self.stats.record(receipt)
        return receipt

    # --- a step's plan ---------------------------------------------------------------------------------------------

    def step(self, output) -> StepPlan:
        """What the workers do in the step that `output` describes."""
        step = StepPlan(forget=self.forget)
        step.keeps, self.keeper.keeps = self.keeper.keeps, []
        step.idle = not output.num_scheduled_tokens
        self.forget, self.rows_planned = False, 0
        waited = len(self.keeper.jobs)
        state = output.kv_connector_block_state
        for req_id in [r for r in self.prefilling if r in output.num_scheduled_tokens]:
            tracked = self.tracked[req_id]
            if state is not None and req_id in state.block_ids:
                tracked.block_ids = list(state.block_ids[req_id][0])
            computed = _computed(output, req_id)
            if tracked.loading:
                tracked.loading, tracked.exact, tracked.receipt = False, False, None
                step.loads.append(self._load(req_id, tracked, computed))
            end = computed + output.num_scheduled_tokens[req_id]
            if tracked.slots is not None:
                step.slots.append(SlotRows(tuple(tracked.block_ids), computed, end, tracked.slots))
            if end >= tracked.rows:
                del self.prefilling[req_id]
                if not tracked.kept:
                    tracked.kept = True
                    self.keeper.keep(tracked, step)
        self.keeper.hand_out(step, waited, idle=step.idle)
        if self.cold is not None:
            step.fetches, step.drops = self.cold.take()
        return step

    def _load(self, req_id: str, tracked: Tracked, end: int) -> LoadPlan:
        plan, policy = tracked.plan, tracked.policy
        return LoadPlan(
            req_id,
            policy.name,
            list(plan.prompt.token_ids),
            tracked.block_ids,
            tracked.start,
            end,
            tracked.rows - self.options.suffix_len,
            tracked.reuse,
            len(plan.chunks),
            policy.placement,
            policy.correction,
            plan.positions if tracked.schema else None,
            tracked.slots,
        )

    # --- what comes back -------------------------------------------------------------------------------------------

    def heard(self, report: WorkerReport) -> None:
        """Receipts of this step's loads, and chunks to strike off the index."""
        for req_id, receipt in report.receipts.items():
            if req_id in self.tracked:
                self.tracked[req_id].receipt = receipt
            self.box.pop(req_id, None)
        for key in report.missing:
            self.index.discard(key)
        if self.cold is not None:
            self.cold.heard(report)

    def take_stats(self) -> ReuseStats:
        """Counts since the last call."""
        stats, self.stats = self.stats, ReuseStats()
        return stats

    def reset(self) -> None:
        """Forget every chunk, here and in the workers (the weights have changed).

        What lies below memory belongs to the weights that were loaded at first: keys of another name from here on.
        """
        self.keeper.clear()
        if self.cold is not None:
            self.cold.forget()
            self.geometry = replace(self.geometry, model_id=f"{self.geometry.model_id} {secrets.token_hex(16)}")
        self.memory.clear()
        self.families.clear()
        self.forget = True

    def close(self) -> None:
        """The engine stops."""
        close_box(self.engine_id)
        if self.cold is not None:
            self.cold.close()


def _computed(output, req_id: str) -> int:
    """Rows of a scheduled request that were complete before this step, ours included."""
    for new in output.scheduled_new_reqs:
        if new.req_id == req_id:
            return new.num_computed_tokens
    cached = output.scheduled_cached_reqs
    return cached.num_computed_tokens[cached.req_ids.index(req_id)]
