"""What is retained of prompts: the index of chunks, their copies out of the paged cache, prefills they wait for."""

import logging
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

PATIENCE = 32  # steps with loads in a row that jobs wait for; a busy server has no others
# Steps from a prompt's last one to its jobs: with asynchronous scheduling the next step is launched before the prompt's
# first token is looked at, and a job in it would keep the token back as long as it takes.
BEHIND = 2
logger = logging.getLogger("vllm.cacheslide")  # below vLLM's logger, so that its handler prints it


def job_of(policy: ReusePolicy, plan: Plan, renew: bool = False) -> EncodeJob:
    """The prefill that makes what is missing of a plan's chunks."""
    return EncodeJob(policy.encoding, policy.probe_layers, plan, renew=renew, scored=policy.needs_scores)


@dataclass
class Waiting:
    """A job, whether it may not wait, and the steps that were planned since the one that asked for it."""

    job: EncodeJob | ScoreJob
    urgent: bool
    steps: int = -1


class ChunkRetention:
    """The scheduler's index and the work that fills it."""

    def __init__(self, options: ServerOptions, geometry: Geometry) -> None:
        self.options, self.geometry = options, geometry
        tiers = options.tiers  # without them nothing is clean: no chunk can be had again
        self.index = ChunkIndex(int(options.store_gib * GIB), "lru" if tiers is None else tiers.policy)
        self.jobs: list[Waiting] = []
        self.score_jobs: list[Waiting] = []
        self.history_saves: list[SavePlan] = []  # of requests that finished since the last step
        self.released: list[ChunkKey] = []  # corrected chunks that such requests were the last to want
        self.storage_tier: StorageTierView | None = None  # the tiers under memory
        self.unsettled = False  # the workers may hold others than the index says
        self.held_back = 0  # steps in a row in which jobs waited because of loads

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
        if all(job.plan.keys != waiting.job.plan.keys for waiting in self.jobs):
            self.jobs.append(Waiting(job, when == "now"))

    def score(self, policy: ReusePolicy, plan: Plan, when: str) -> None:
        """Have the exact chunks of a plan scored that have no scores, where the policy needs them; never when "off"."""
        if when == "off" or not policy.needs_scores or not plan.chunks:
            return
        if all(plan.keys != w.job.plan.keys for w in self.score_jobs):
            self.score_jobs.append(Waiting(ScoreJob(policy.encoding, plan), when == "now"))

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

    def hand_out(self, step: StepPlan, idle: bool) -> None:
        """Hand out jobs: urgent ones at once, others `BEHIND` steps later.

        A step with loads is left to them, but not for ever (`PATIENCE`).
        """
        busy = bool(step.loads) and not idle
        self.held_back = self.held_back + 1 if busy and (self.jobs or self.score_jobs) else 0
        if self.held_back > PATIENCE:
            busy, self.held_back = False, 0
        for entry in (*self.jobs, *self.score_jobs):
            entry.steps += 1
        budget = self._hand_out_encodes(step, self.options.encode_tokens_per_step, busy)
        self._hand_out_scores(step, budget, busy)

    def _hand_out_encodes(self, step: StepPlan, budget: int, busy: bool) -> int:
        """Hand out encode jobs; the tokens of `budget` that are left."""
        waiting = []
        for entry in self.jobs:
            job = entry.job
            renewed = [key for key in job.plan.keys if job.renew and self.index.generation(key)]
            missing = [key not in self.index or key in renewed for key in job.plan.keys]
            tokens = job.tokens(missing)
            if not tokens:
                continue
            if not _goes(entry, tokens <= budget or not step.encodes, busy):
                waiting.append(entry)
                continue
            evict = self.reserve(dict(job.plan.keyed), len(job.capture), scored=job.scored)
            if evict is not None:
                budget -= tokens
                self.index.set_exact(renewed)
                step.encodes.append(replace(job, evict=evict, renewed=tuple(renewed)))
        self.jobs = waiting
        return budget

    def _hand_out_scores(self, step: StepPlan, budget: int, busy: bool) -> None:
        """Hand out score jobs of what is or will be there, with what encode jobs left of the budget."""
        still, waiting = {key for entry in self.jobs for key in entry.job.plan.keys}, []
        for entry in self.score_jobs:
            wanted = {k for k in entry.job.plan.keys if k in self.index and not self.index.generation(k)}
            job = entry.job.of(wanted - self.index.scored)
            if not still.isdisjoint(entry.job.plan.keys):
                waiting.append(entry)
                continue
            if not job.plan.chunks:
                continue
            if not _goes(entry, job.tokens <= budget or not (step.encodes or step.scores), busy):
                waiting.append(entry)
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


def _goes(entry: Waiting, fits: bool, busy: bool) -> bool:
    """Whether a job goes in this step."""
    return entry.urgent or (fits and entry.steps >= BEHIND and not busy)
