"""Storing chunks of prompts: the index of chunks, copies from the paged cache, and queued prefills."""

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

PATIENCE = 32  # consecutive steps with loads after which jobs run anyway, on a server that is always busy
# Steps between a prompt's last step and its jobs. With asynchronous scheduling the next step is launched before the
# prompt's first token is returned; a job in it would delay the token.
BEHIND = 2
logger = logging.getLogger("vllm.cacheslide")  # a child of vLLM's logger, whose handler prints it


def job_of(policy: ReusePolicy, plan: Plan, renew: bool = False) -> EncodeJob:
    """The prefill that makes the missing chunks of a plan."""
    return EncodeJob(policy.encoding, policy.probe_layers, plan, renew=renew, scored=policy.needs_scores)


@dataclass
class Waiting:
    """A job, whether it is urgent, and the number of steps planned since it was requested."""

    job: EncodeJob | ScoreJob
    urgent: bool
    steps: int = -1


class ChunkRetention:
    """The scheduler's index and the work that fills it."""

    def __init__(self, options: ServerOptions, geometry: Geometry) -> None:
        self.options, self.geometry = options, geometry
        tiers = options.tiers  # without tiers nothing is clean: a dropped chunk is lost
        self.index = ChunkIndex(int(options.store_gib * GIB), "lru" if tiers is None else tiers.policy)
        self.jobs: list[Waiting] = []
        self.score_jobs: list[Waiting] = []
        self.history_saves: list[SavePlan] = []  # of requests finished since the last step
        self.released: list[ChunkKey] = []  # corrected chunks that no other request needs
        self.storage_tier: StorageTierView | None = None  # the tiers under memory
        self.unsettled = False  # the workers may hold chunks other than the index's
        self.held_back = 0  # consecutive steps in which loads delayed jobs

    @property
    def pending(self) -> bool:
        """Whether chunks wait to be encoded or copied."""
        return bool(self.jobs or self.score_jobs or self.history_saves or self.released)

    def drop_work(self) -> None:
        """After a fault: drop queued work, so that an idle engine stops stepping; the index is unsettled."""
        self.jobs.clear()
        self.score_jobs.clear()
        self.history_saves.clear()
        self.released.clear()
        self.unsettled = True

    def retain(self, tracked: Tracked, step: StepPlan) -> None:
        """Store the chunks of a prompt completed in this step by copying, or queue their prefill."""
        plan, policy = tracked.plan, tracked.policy
        missing = {k: c for k, c in plan.keyed if k not in self.index}
        if tracked.encode == "off":
            return
        self.score(policy, plan, tracked.encode)
        if not missing:
            return
        # Reused rows are loaded in this step and the load may fail: only rows computed by vLLM are copied.
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
        """Queue a job, unless it is queued already."""
        if all(job.plan.keys != waiting.job.plan.keys for waiting in self.jobs):
            self.jobs.append(Waiting(job, when == "now"))

    def score(self, policy: ReusePolicy, plan: Plan, when: str) -> None:
        """Queue scoring of a plan's exact unscored chunks, if the policy needs scores; never when "off"."""
        if when == "off" or not policy.needs_scores or not plan.chunks:
            return
        if all(plan.keys != w.job.plan.keys for w in self.score_jobs):
            self.score_jobs.append(Waiting(ScoreJob(policy.encoding, plan), when == "now"))

    def reserve(
        self, chunks: Mapping[ChunkKey, Chunk], probes: int, generation: int = 0, scored: bool = False
    ) -> tuple[ChunkKey, ...] | None:
        """Reserve room for `chunks` with inputs of `probes` layers: the keys to evict, None if too large."""
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
        """End a session: drop the corrected chunks of its last prompt, unwritten; exact ones stay."""
        saving = {key for save in self.history_saves for key, _ in save.chunks}
        coming = set() if self.storage_tier is None else self.storage_tier.coming.keys()
        gone = [k for k in plan.keys if k not in saving and k not in coming and not self.index.is_exact(k)]
        for key in gone:
            self.index.discard(key)
        self.released += gone

    def hand_out(self, step: StepPlan, idle: bool) -> None:
        """Hand out jobs: urgent ones at once, others `BEHIND` steps later.

        Steps with loads get no others, at most `PATIENCE` times in a row.
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
        """Hand out encode jobs; returns the rest of `budget`, in tokens."""
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
        """Hand out score jobs of chunks that are or will be stored, within the rest of the budget."""
        unencoded, waiting = {key for entry in self.jobs for key in entry.job.plan.keys}, []
        for entry in self.score_jobs:
            wanted = {k for k in entry.job.plan.keys if k in self.index and not self.index.generation(k)}
            job = entry.job.of(wanted - self.index.scored)
            if not unencoded.isdisjoint(entry.job.plan.keys):
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
        """Clear the index and all queues."""
        self.index.clear()
        self.jobs.clear()
        self.score_jobs.clear()
        self.history_saves.clear()
        self.released.clear()


def _goes(entry: Waiting, fits: bool, busy: bool) -> bool:
    """Whether a job runs in this step."""
    return entry.urgent or (fits and entry.steps >= BEHIND and not busy)
