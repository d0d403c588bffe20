"""Messages between scheduler and workers: plans of a step and the workers' reports. Plain data: sent by pickle."""

from collections.abc import Set
from dataclasses import dataclass, field, replace
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from cacheslide.core.keys import ChunkKey
from cacheslide.core.placement import Placement
from cacheslide.core.plan import Plan
from cacheslide.core.prompt import Chunk
from cacheslide.core.remembering import fixed_before
from cacheslide.policies.base import Correction, Encoding
from cacheslide.positions.ccpe import PromptSlots
from cacheslide.vllm.cope.slots import SlotRows


@dataclass(frozen=True)
class LoadPlan:
    """Complete rows [start, end) of a request from cached chunks.

    `plan` covers the whole prompt; `reuse` are those of its chunks that the scheduler's index holds; rows from `limit`
    on are always recomputed. `slots` are the slots that a calibrated CoPE model crosses.
    """

    req_id: str
    system: str
    plan: Plan
    block_ids: list[int]
    start: int
    end: int
    limit: int
    reuse: tuple[tuple[ChunkKey, Chunk], ...]
    placement: Placement
    correction: Correction
    slots: PromptSlots | None = None

    @property
    def rows(self) -> int:
        """Number of tokens of the prompt."""
        return len(self.plan.prompt)


@dataclass(frozen=True)
class SavePlan:
    """Copy chunks from a request's blocks, after dropping `evict`; `generation` is 0 if vLLM computed them.

    With `scored` a `ScoreJob` of these chunks follows.
    """

    block_ids: list[int]
    chunks: tuple[tuple[ChunkKey, Chunk], ...]
    evict: tuple[ChunkKey, ...]
    generation: int = 0
    scored: bool = False


@dataclass(frozen=True)
class EncodeJob:
    """Prefill the missing chunks of a plan exactly, in the context of their encoding, and store them.

    `evict` frees memory for its chunks. With `renew` corrected copies of its chunks count as missing; `renewed` are
    those present when the job is handed out. With `scored` a `ScoreJob` of its chunks follows.
    """

    encoding: Encoding
    capture: frozenset[int]
    plan: Plan
    evict: tuple[ChunkKey, ...] = ()
    renewed: tuple[ChunkKey, ...] = ()
    renew: bool = False
    scored: bool = False

    def parts(self) -> "list[EncodeJob]":
        """The job as prefills: one for each chunk if chunks are encoded in isolation, else one."""
        if not self.encoding.separate:
            return [self]
        return [replace(self, plan=part) for part in self.plan.parts()]

    def tokens(self, missing: list[bool]) -> int:
        """Tokens to prefill, given which of its chunks are missing."""
        return self.encoding.tokens(self.plan.chunks, missing)


@dataclass(frozen=True)
class ScoreJob:
    """Compute the remembered deviations of a plan's chunks; nothing else is stored.

    Their KV is compared with that of their other context (`Contrast`), prefilled in scratch KV: the chain of fixed text
    for an encoding in the prompt, else the prompt.
    """

    encoding: Encoding
    plan: Plan

    @property
    def tokens(self) -> int:
        """Upper bound of the tokens to prefill."""
        end = self.plan.chunks[-1].end
        return fixed_before(self.plan.prompt, [end])[0] if self.encoding.in_prompt else end

    def of(self, keys: Set[ChunkKey]) -> "ScoreJob":
        """The job restricted to these chunks."""
        kept = [(key, chunk) for key, chunk in self.plan.keyed if key in keys]
        plan = replace(self.plan, keys=tuple(k for k, _ in kept), chunks=tuple(c for _, c in kept))
        return replace(self, plan=plan)


@dataclass(frozen=True)
class FetchPlan:
    """Start reading a chunk from the storage tiers, after dropping `evict`.

    `tokens` is its length, 0 if any length is accepted. `ticket` distinguishes this attempt from earlier ones, which
    some ranks may still report on.
    """

    key: ChunkKey
    evict: tuple[ChunkKey, ...]
    ticket: int
    tokens: int = 0


@dataclass
class StepPlan(KVConnectorMetadata):
    """One step's work, in this order: forget, save, load, (forward), save, encode, score, take in.

    `history_saves` are chunks of finished requests, whose blocks may be reused in this very step. Reads of `fetches`
    start first and are taken into memory when they end, after a step's loads, since a chunk evicted by a fetch may
    still be loaded in its step. `drops` were read by some ranks and could not be read by others. Corrected KV of
    `released` is no longer needed. An `idle` step has no forward: workers may wait briefly for reads instead of
    spinning. `slots` are rows of the forward that a calibrated CoPE model treats specially. `failed` are blocks, by
    request, with claimed rows that cannot be loaded. `index`, sent when the workers' chunks may differ from it, maps
    every key with room to whether the chunk must be there at the step's end.
    """

    forget: bool = False
    fetches: list[FetchPlan] = field(default_factory=list)
    drops: list[ChunkKey] = field(default_factory=list)
    released: list[ChunkKey] = field(default_factory=list)
    idle: bool = False
    history_saves: list[SavePlan] = field(default_factory=list)
    loads: list[LoadPlan] = field(default_factory=list)
    saves: list[SavePlan] = field(default_factory=list)
    encodes: list[EncodeJob] = field(default_factory=list)
    scores: list[ScoreJob] = field(default_factory=list)
    slots: list[SlotRows] = field(default_factory=list)
    failed: dict[str, list[int]] = field(default_factory=dict)
    index: dict[ChunkKey, bool] | None = None


@dataclass(frozen=True)
class ChunkLoaded:
    """A chunk read by one rank: the lowest tier it came from, its bytes and generation, and whether it has scores."""

    ticket: int
    tier: str
    nbytes: int
    generation: int
    scored: bool = False


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """Receipts by request, missing chunks, and results of reads from storage tiers.

    `loaded` has one entry per rank, `failed` the ticket and one reason. `unsettled`: the chunks must be compared with
    the index once more. `wants_idle`: work waits for a step without a forward.
    """

    receipts: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: set[ChunkKey] = field(default_factory=set)
    loaded: dict[ChunkKey, list[ChunkLoaded]] = field(default_factory=dict)
    failed: dict[ChunkKey, tuple[int, str]] = field(default_factory=dict)
    unsettled: bool = False
    wants_idle: bool = False

    def aggregate(self, other: "WorkerReport") -> "WorkerReport":
        """Merge the reports of two ranks; all ranks do the same work, so one receipt suffices."""
        keys = {*self.loaded, *other.loaded}
        loaded = {k: self.loaded.get(k, []) + other.loaded.get(k, []) for k in keys}
        missing = self.missing | other.missing
        unsettled = self.unsettled or other.unsettled
        wants_idle = self.wants_idle or other.wants_idle
        failed = other.failed | self.failed
        return WorkerReport(other.receipts | self.receipts, missing, loaded, failed, unsettled, wants_idle)

    def __bool__(self) -> bool:
        return any((self.receipts, self.missing, self.loaded, self.failed, self.unsettled, self.wants_idle))
