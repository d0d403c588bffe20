"""What the scheduler tells the workers in a step, and what they report back. Plain data: it crosses processes."""

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from cacheslide.correction import Correction
from cacheslide.keys import ChunkKey
from cacheslide.placement import Placement
from cacheslide.policy import Encoding
from cacheslide.positions.ccpe import PromptSlots
from cacheslide.prompt import Chunk, Prompt
from cacheslide.vllm.cope_slots import SlotRows


@dataclass(frozen=True)
class LoadPlan:
    """Complete rows [start, end) of a request from cached chunks.

    `token_ids` and `positions` cover the whole prompt, `positions` only where a row's position is not its index;
    `reuse` names the chunks the scheduler's index holds; rows from `limit` on are always recomputed. `slots` are those
    that a calibrated CoPE model crosses.
    """

    req_id: str
    system: str
    token_ids: list[int]
    block_ids: list[int]
    start: int
    end: int
    limit: int
    reuse: tuple[tuple[ChunkKey, Chunk], ...]
    chunks: int
    placement: Placement
    correction: Correction
    positions: tuple[int, ...] | None = None
    slots: PromptSlots | None = None


@dataclass(frozen=True)
class SavePlan:
    """Copy chunks out of a request's blocks, after dropping `evict`; `generation` is 0 where vLLM computed them."""

    block_ids: list[int]
    chunks: tuple[tuple[ChunkKey, Chunk], ...]
    evict: tuple[ChunkKey, ...]
    generation: int = 0


@dataclass(frozen=True)
class EncodeJob:
    """Prefill and keep the chunks of a prompt that are missing, exactly, in the context of their encoding.

    With `renew` corrected copies of its chunks count as missing.
    """

    encoding: Encoding
    capture: frozenset[int]
    prompt: Prompt
    positions: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    keys: tuple[ChunkKey, ...]
    evict: tuple[ChunkKey, ...] = ()
    renew: bool = False

    def tokens(self, missing: list[bool]) -> int:
        """Tokens this job will prefill, given which of its chunks are missing."""
        if not any(missing):
            return 0
        if self.encoding.kind == "in_prompt":
            return self.chunks[-1].end
        first = missing.index(True) if self.encoding.kind == "fixed_chain" else 0
        wanted = [len(c) for c, m in zip(self.chunks, missing, strict=True) if m or self.encoding.kind == "fixed_chain"]
        return sum(wanted[first:]) if self.encoding.kind == "fixed_chain" else sum(wanted)


@dataclass
class StepPlan(KVConnectorMetadata):
    """One step's work, in the order in which it must happen: forget, keep, load, (vLLM's forward), save, encode.

    `keeps` are chunks of requests that have finished: their blocks may be given away in this very step. `slots` are the
    rows of the forward that a calibrated CoPE model may have to treat in its own way.
    """

    forget: bool = False
    keeps: list[SavePlan] = field(default_factory=list)
    loads: list[LoadPlan] = field(default_factory=list)
    saves: list[SavePlan] = field(default_factory=list)
    encodes: list[EncodeJob] = field(default_factory=list)
    slots: list[SlotRows] = field(default_factory=list)


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """Receipts by request, and chunks that a worker was asked for but did not hold."""

    receipts: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: set[ChunkKey] = field(default_factory=set)

    def aggregate(self, other: "WorkerReport") -> "WorkerReport":
        """All ranks do the same work on the same rows: one receipt stands for all."""
        return WorkerReport(other.receipts | self.receipts, self.missing | other.missing)
