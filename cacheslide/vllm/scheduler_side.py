"""The scheduler's half: what each marked request reuses, what is kept of it, and what its receipt says."""

import logging
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

from cacheslide.engine import Plan, Receipt, make_plan
from cacheslide.errors import CacheSlideError, PolicyError, StoreError
from cacheslide.keys import CacheIdentity, ChunkKey
from cacheslide.policy import ReusePolicy
from cacheslide.prompt import Chunk
from cacheslide.vllm import reasons
from cacheslide.vllm.geometry import Geometry
from cacheslide.vllm.index import ChunkIndex
from cacheslide.vllm.mailbox import close_box, open_box
from cacheslide.vllm.metrics import ReuseStats
from cacheslide.vllm.params import Marks, ServerOptions
from cacheslide.vllm.plans import EncodeJob, LoadPlan, SavePlan, StepPlan, WorkerReport
from cacheslide.vllm.prefix_cache import key_apart
from cacheslide.vllm.support import check_policy

logger = logging.getLogger("vllm.cacheslide")  # below vLLM's logger, so that its handler prints it


@dataclass
class _Tracked:
    """A marked request from its arrival to its end."""

    rows: int
    system: str
    reason: str = ""  # why it is computed exactly
    policy: ReusePolicy | None = None
    plan: Plan | None = None
    encode: str = "later"
    schema: bool = False  # its rows' positions are not their indices
    exact: bool = True  # every row so far was computed by vLLM itself
    kept: bool = False
    start: int = 0  # rows before it come from vLLM's prefix cache
    reuse: tuple[tuple[ChunkKey, Chunk], ...] = ()
    loading: bool = False
    block_ids: list[int] = field(default_factory=list)
    receipt: dict[str, Any] | None = None


class SchedulerSide:
    """Owns the index of chunks. `vllm_config` and `geometry` describe the engine it serves."""

    def __init__(self, vllm_config, options: ServerOptions, geometry: Geometry) -> None:
        self.options, self.geometry = options, geometry
        self.block_size = vllm_config.cache_config.block_size
        self.engine_id = vllm_config.kv_transfer_config.engine_id
        self.box = open_box(self.engine_id)
        self.index = ChunkIndex(int(options.store_gib * 2**30))
        self.tracked: dict[str, _Tracked] = {}
        self.prefilling: dict[str, None] = {}  # tracked requests whose prompt is not complete yet, in order of arrival
        self.jobs: deque[tuple[EncodeJob, bool]] = deque()  # and whether it may not wait
        self.stats = ReuseStats()
        self.rows_planned = 0  # claimed in the step being scheduled
        self.forget = False

    # --- a request's way -------------------------------------------------------------------------------------------

    def arrive(self, request) -> None:
        """Plan a marked request. Whatever is wrong with it makes it exact, never fails the engine."""
        rows = request.num_prompt_tokens
        try:
            marks = Marks.parse(request.kv_transfer_params)
            if marks is None:
                return
            tracked = self._plan(request, marks)
        except CacheSlideError as wrong:
            tracked = _Tracked(rows, "", reason=str(wrong), kept=True)
        self.tracked[request.request_id] = tracked
        self.prefilling[request.request_id] = None

    def _plan(self, request, marks: Marks) -> _Tracked:
        policy = marks.system(self.options.policy)
        check_policy(policy, self.geometry.num_layers, self.geometry.ranks)
        prompt = marks.prompt(request.prompt_token_ids)
        if policy.transform(prompt) != prompt:
            raise PolicyError(f"{policy.name} rewrites prompts: apply its transform before sending")
        tenant = "\0".join((self.options.namespace, marks.namespace, request.cache_salt or ""))
        identity = CacheIdentity(self.geometry.model_id, self.geometry.dtype, namespace=tenant)
        plan = make_plan(policy, identity, prompt, self.options.chunk_size, self.geometry.max_positions)
        tracked = _Tracked(len(prompt), policy.name, policy=policy, plan=plan)
        tracked.encode = marks.encode or self.options.encode
        tracked.schema = plan.positions[-1] != len(prompt) - 1
        sampling = request.sampling_params
        if sampling is not None and sampling.prompt_logprobs is not None:
            tracked.reason = reasons.PROMPT_LOGPROBS
        elif not plan.chunks:
            tracked.reason = f"{policy.name} reuses nothing of this prompt"
        elif tracked.schema:
            request.skip_reading_prefix_cache = True  # shared blocks hold keys at other positions than the schema's
        return tracked

    def claim(self, request, computed: int) -> int | None:
        """Rows the worker will complete by reuse beyond the `computed` ones; None to be asked again in a later step."""
        tracked = self.tracked.get(request.request_id)
        if tracked is None or tracked.reason not in reasons.RETRY:
            return 0
        limit = tracked.rows - max(1, self.options.suffix_len)
        reuse = tuple(
            (key, chunk)
            for key, chunk in zip(tracked.plan.keys, tracked.plan.chunks, strict=True)
            if key in self.index and max(chunk.start, computed) < min(chunk.end, limit)
        )
        tracked.start, tracked.reuse = computed, reuse
        # Behind the last reused row the text is exact work over completed KV: vLLM does it best itself, together with
        # the last row, for which it reads all weights anyway.
        want = min(limit, max((chunk.end for _, chunk in reuse), default=tracked.rows)) - computed
        if want <= 0 or not reuse:
            stored = any(key in self.index for key in tracked.plan.keys)
            tracked.reason = reasons.NOT_STORED_BEYOND if stored else reasons.NOT_STORED
            if want <= 0:
                tracked.reason = reasons.COVERED
            return 0
        if self.rows_planned and self.rows_planned + want > self.options.rows_per_step:
            return None
        tracked.reason = ""
        self.rows_planned += want
        self.index.touch(tracked.plan.keys)
        key_apart(request, computed // self.block_size)
        return want

    def allocated(self, request, external: int) -> None:
        """vLLM gave the request its blocks; `external` of its rows are ours to complete."""
        tracked = self.tracked.get(request.request_id)
        if tracked is not None:
            tracked.loading = external > 0
            self.prefilling[request.request_id] = None  # again, when it comes back from a preemption

    def finish(self, request) -> dict[str, Any] | None:
        """Forget the request; returns its receipt, None for one without marks."""
        tracked = self.tracked.pop(request.request_id, None)
        self.prefilling.pop(request.request_id, None)
        measured = self.box.pop(request.request_id, None)
        if tracked is None:
            return None
        receipt = measured or tracked.receipt or self._forecast(tracked)
        self.stats.record(receipt)
        return receipt

    def _forecast(self, tracked: _Tracked) -> dict[str, Any]:
        """The receipt of an exactly computed request, or of one whose worker has not reported yet."""
        receipt = Receipt(tracked.system, tracked.rows, chunks=len(tracked.plan.chunks) if tracked.plan else 0)
        receipt.fallback = tracked.reason
        if not tracked.exact:
            receipt.chunks_hit = len(tracked.reuse)
        return receipt.as_dict() | {"rows_prefix_cached": tracked.start, "measured": tracked.exact}

    # --- a step's plan ---------------------------------------------------------------------------------------------

    def step(self, output) -> StepPlan:
        """What the workers do in the step that `output` describes."""
        step = StepPlan(forget=self.forget)
        self.forget, self.rows_planned = False, 0
        waited = len(self.jobs)
        state = output.kv_connector_block_state
        for req_id in [r for r in self.prefilling if r in output.num_scheduled_tokens]:
            tracked = self.tracked[req_id]
            if state is not None and req_id in state.block_ids:
                tracked.block_ids = list(state.block_ids[req_id][0])
            computed = _computed(output, req_id)
            if tracked.loading:
                tracked.loading, tracked.exact, tracked.receipt = False, False, None
                step.loads.append(self._load(req_id, tracked, computed))
            if computed + output.num_scheduled_tokens[req_id] >= tracked.rows:
                del self.prefilling[req_id]
                if not tracked.kept:
                    tracked.kept = True
                    self._keep(tracked, step)
        self._emit_jobs(step, waited, idle=not output.num_scheduled_tokens)
        return step

    def _load(self, req_id: str, tracked: _Tracked, end: int) -> LoadPlan:
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
        )

    def _keep(self, tracked: _Tracked, step: StepPlan) -> None:
        """The request's prompt is complete in this step: keep its chunks, or have them encoded."""
        plan, policy = tracked.plan, tracked.policy
        missing = {k: c for k, c in zip(plan.keys, plan.chunks, strict=True) if k not in self.index}
        if not missing or tracked.encode == "off":
            return
        if policy.encoding.kind == "in_prompt" and tracked.exact and not policy.probe_layers and not tracked.schema:
            evict = self._reserve(missing, policy)
            if evict is not None:
                step.saves.append(SavePlan(tracked.block_ids, tuple(missing.items()), evict))
            return
        job = EncodeJob(policy.encoding, policy.probe_layers, plan.prompt, plan.positions, plan.chunks, plan.keys)
        if all(job.keys != waiting.keys for waiting, _ in self.jobs):
            self.jobs.append((job, tracked.encode == "now"))

    def _reserve(self, chunks: dict[ChunkKey, Chunk], policy_or_job) -> tuple[ChunkKey, ...] | None:
        probes = len(policy_or_job.probe_layers if isinstance(policy_or_job, ReusePolicy) else policy_or_job.capture)
        try:
            return tuple(self.index.reserve({k: self.geometry.chunk_bytes(len(c), probes) for k, c in chunks.items()}))
        except StoreError as full:
            logger.warning("CacheSlide keeps nothing of a prompt: %s", full)
            return None

    def _emit_jobs(self, step: StepPlan, waited: int, idle: bool) -> None:
        """Hand out jobs; the first `waited` come from earlier steps, the others go only if they may not wait."""
        budget, waiting = self.options.encode_tokens_per_step, deque()
        for number, (job, urgent) in enumerate(self.jobs):
            missing = [key not in self.index for key in job.keys]
            tokens = job.tokens(missing)
            if not tokens:
                continue
            fits = tokens <= budget or not step.encodes
            if not urgent and not (fits and number < waited and (idle or not step.loads)):
                waiting.append((job, urgent))
                continue
            evict = self._reserve(dict(zip(job.keys, job.chunks, strict=True)), job)
            if evict is not None:
                budget -= tokens
                step.encodes.append(replace(job, evict=evict))
        self.jobs = waiting

    # --- what comes back -------------------------------------------------------------------------------------------

    def heard(self, report: WorkerReport) -> None:
        """Receipts of this step's loads, and chunks to strike off the index."""
        for req_id, receipt in report.receipts.items():
            if req_id in self.tracked:
                self.tracked[req_id].receipt = receipt
            self.box.pop(req_id, None)
        for key in report.missing:
            self.index.discard(key)

    def take_stats(self) -> ReuseStats:
        """Counts since the last call."""
        stats, self.stats = self.stats, ReuseStats()
        return stats

    def reset(self) -> None:
        """Forget every chunk, here and in the workers (the weights have changed)."""
        self.index.clear()
        self.jobs.clear()
        self.forget = True

    def close(self) -> None:
        """The engine stops."""
        close_box(self.engine_id)


def _computed(output, req_id: str) -> int:
    """Rows of a scheduled request that were complete before this step, ours included."""
    for new in output.scheduled_new_reqs:
        if new.req_id == req_id:
            return new.num_computed_tokens
    cached = output.scheduled_cached_reqs
    return cached.num_computed_tokens[cached.req_ids.index(req_id)]
