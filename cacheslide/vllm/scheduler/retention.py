"""What is retained of prompts: the index of chunks, their copies out of the paged cache, prefills they wait for."""

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

from cacheslide.core.keys import ChunkKey
from cacheslide.core.plan import Plan
from cacheslide.core.prompt import Chunk
from cacheslide.core.retention import generation_of_copy
from cacheslide.errors import StoreError
from cacheslide.policies.base import ReusePolicy
from cacheslide.units import GIB
from cacheslide.vllm.geometry import Geometry
from cacheslide.vllm.options import ServerOptions
from cacheslide.vllm.protocol import EncodeJob, SavePlan, ScoreJob, StepPlan
from cacheslide.vllm.scheduler.chunk_index import ChunkIndex
from cacheslide.vllm.scheduler.request_state import Tracked
from cacheslide.vllm.scheduler.storage import StorageTierView

logger = logging.getLogger("vllm.cacheslide")  # below vLLM's logger, so that its handler prints it


def job_of(policy: ReusePolicy, plan: Plan, renew: bool = False) -> EncodeJob:
    """The prefill that makes what is missing of a plan's chunks."""
    return EncodeJob(policy.encoding, policy.probe_layers, plan, renew=renew, scored=policy.needs_scores)


@dataclass(frozen=True)
class Scoring:
    """A score job, whether it may not wait, and whether it comes from an earlier step."""

    job: ScoreJob
    urgent: bool
    waited: bool = False


class ChunkRetention:
    """The scheduler's index and the work that fills it."""

    def __init__(self, options: ServerOptions, geometry: Geometry) -> None:
        self.options, self.geometry = options, geometry
        tiers = options.tiers  # without them nothing is clean: no chunk can be had again
        self.index = ChunkIndex(int(options.store_gib * GIB), "lru" if tiers is None else tiers.policy)
        self.jobs: deque[tuple[EncodeJob, bool]] = deque()  # and whether it may not wait
        self.score_jobs: list[Scoring] = []
        self.history_saves: list[SavePlan] = []  # of requests that finished since the last step
        self.released: list[ChunkKey] = []  # corrected chunks that such requests were the last to want
        self.storage_tier: StorageTierView | None = None  # the tiers under memory
        self.unsettled = False  # the workers may hold others than the index says

    @property
    def pending(self) -> bool:
        """Whether chunks wait to be encoded or copied."""
        return bool(self.jobs or self.score_jobs or self.history_saves or self.released)

    def drop_work(self) -> None:
        """After a fault: what waits is not done, lest an idle engine step for it for ever; the index is in doubt."""
        self.jobs.clear()
        self.score_jobs.clear()
        self.history_saves.clear()
        self.released.clear()
        self.released.clear()
        self.unsettled = True

    def retain(self, tracked: Tracked, step: StepPlan) -> None:
        """The request's prompt is complete in this step: retain its chunks, or have them encoded."""
        plan, policy = tracked.plan, tracked.policy
        missing = {k: c for k, c in plan.keyed if k not in self.index}
        if tracked.encode == "off":
            return
        self.score(policy, plan, tracked.encode)
        if not missing:
            return
        # Reused rows are loaded in this very step, and a load may fail: only what vLLM computes is copied behind it.
        in_place = tracked.exact and not tracked.schema
        oldest = tracked.generation
        if generation_of_copy(policy, exact=tracked.exact, oldest=oldest, limit=0, in_place=in_place) is not None:
            scored = policy.needs_scores
            evict = self.reserve(missing, len(policy.probe_layers), scored=scored)
            if evict is not None:
                step.saves.append(SavePlan(tracked.block_ids, tuple(missing.items()), evict, scored=scored))
            return
        self.enqueue(job_of(policy, plan), tracked.encode)

    def enqueue(self, job: EncodeJob, when: str) -> None:
        """Have a job done, unless it waits already."""
        if all(job.plan.keys != waiting.plan.keys for waiting, _ in self.jobs):
            self.jobs.append((job, when == "now"))

    def score(self, policy: ReusePolicy, plan: Plan, when: str) -> None:
        """Have the exact chunks of a plan scored that have no scores, where the policy needs them; never when "off"."""
        if when == "off" or not policy.needs_scores or not plan.chunks:
            return
        if all(plan.keys != w.job.plan.keys for w in self.score_jobs):
            self.score_jobs.append(Scoring(ScoreJob(policy.encoding, plan), when == "now"))

    def reserve(
        self, chunks: Mapping[ChunkKey, Chunk], probes: int, generation: int = 0, scored: bool = False
    ) -> tuple[ChunkKey, ...] | None:
        """Room in the index for `chunks` with the inputs of `probes` layers: the keys that leave, None if too large."""
        sizes = {key: self.geometry.chunk_bytes(len(chunk), probes, scored) for key, chunk in chunks.items()}
        try:
            evict = tuple(self.index.reserve(sizes, generation))
        except StoreError as full:
            logger.warning("CacheSlide retains nothing of a prompt: %s", full)
            return None
        if self.storage_tier is not None:
            self.storage_tier.evicted(evict)
        return evict

    def release(self, plan: Plan) -> None:
        """A session is over: the corrected chunks of its last prompt leave, unwritten; exact ones stay."""
        saving = {key for save in self.history_saves for key, _ in save.chunks}
        coming = set() if self.storage_tier is None else self.storage_tier.coming.keys()
        gone = [k for k in plan.keys if k not in saving and k not in coming and not self.index.is_exact(k)]
        for key in gone:
            self.index.discard(key)
        self.released += gone

    def hand_out(self, step: StepPlan, waited: int, idle: bool) -> None:
        """Hand out jobs; the first `waited` come from earlier steps, the others go only if they may not wait."""
        budget, waiting = self.options.encode_tokens_per_step, deque()
        for number, (job, urgent) in enumerate(self.jobs):
            renewed = [key for key in job.plan.keys if job.renew and self.index.generation(key)]
            missing = [key not in self.index or key in renewed for key in job.plan.keys]
            tokens = job.tokens(missing)
            if not tokens:
                continue
            fits = tokens <= budget or not step.encodes
            if not urgent and not (fits and number < waited and (idle or not step.loads)):
                waiting.append((job, urgent))
                continue
            evict = self.reserve(dict(job.plan.keyed), len(job.capture), scored=job.scored)
            if evict is not None:
                budget -= tokens
                self.index.set_exact(renewed)
                step.encodes.append(replace(job, evict=evict, renewed=tuple(renewed)))
        self.jobs = waiting
        self._hand_out_scores(step, budget, idle)

    def _hand_out_scores(self, step: StepPlan, budget: int, idle: bool) -> None:
        """Hand out score jobs of what is or will be there, with what encode jobs left of the budget."""
        still, waiting = {key for job, _ in self.jobs for key in job.plan.keys}, []
        for entry in self.score_jobs:
            wanted = {k for k in entry.job.plan.keys if k in self.index and not self.index.generation(k)}
            job = entry.job.of(wanted - self.index.scored)
            if not still.isdisjoint(entry.job.plan.keys):
                waiting.append(replace(entry, waited=True))
                continue
            if not job.plan.chunks:
                continue
            fits = job.tokens <= budget or not (step.encodes or step.scores)
            if not entry.urgent and not (fits and entry.waited and (idle or not step.loads)):
                waiting.append(replace(entry, waited=True))
                continue
            budget -= job.tokens
            self.index.scored.update(job.plan.keys)
            step.scores.append(job)
        self.score_jobs = waiting

    def clear(self) -> None:
        """Forget everything."""
        self.index.clear()
        self.jobs.clear()
        self.score_jobs.clear()
        self.history_saves.clear()
        self.released.clear()
