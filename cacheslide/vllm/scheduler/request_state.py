"""State of one request on the scheduler side, and of families of requests that continue one prompt."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from cacheslide.core.keys import CacheIdentity, ChunkKey
from cacheslide.core.plan import Plan
from cacheslide.core.prompt import Chunk
from cacheslide.policies.base import ReusePolicy
from cacheslide.positions.ccpe import PromptSlots
from cacheslide.vllm.options import Annotations
from cacheslide.vllm.scheduler.prefix_cache import key_apart, new_secret
from cacheslide.vllm.scheduler.reasons import AS_FAMILY


@dataclass
class FromStorage:
    """A request's chunks in storage tiers (`storage.py`).

    The pending look-up, each chunk's tier ("" for none), the requested reads, chunks leased for it, tier and bytes of
    loaded chunks, failures of others, and whether a fault has ended storage reads for it.
    """

    lookup: Future[dict[ChunkKey, str]] | None = None
    since: float = 0.0  # start of the look-up, monotonic seconds
    places: dict[ChunkKey, str] = field(default_factory=dict)
    tried: set[ChunkKey] = field(default_factory=set)
    leased: set[ChunkKey] = field(default_factory=set)
    tiers: dict[ChunkKey, tuple[str, int]] = field(default_factory=dict)
    failures: dict[ChunkKey, str] = field(default_factory=dict)
    faulty: bool = False  # no further look-ups or reads


@dataclass
class Tracked:
    """State of an annotated request from arrival to end."""

    rows: int
    system: str
    reason: str = ""  # why it is computed exactly
    policy: ReusePolicy | None = None
    plan: Plan | None = None
    encode: str = "later"
    slots: PromptSlots | None = None  # slots that a calibrated CoPE model crosses
    schema: bool = False  # positions of rows differ from their indices
    exact: bool = True  # every row so far was computed by vLLM
    identity: CacheIdentity | None = None
    spans: tuple[tuple[int, int], ...] = ()  # fixed spans, in tokens
    history: int | None = None  # rows from here on are fixed text of the next turn
    last: bool = False  # the session ends: corrected chunks of its prompt are dropped
    generation: int = 0  # the highest generation among reused chunks
    note: str = ""
    retained: bool = False
    start: int = 0  # rows before it come from vLLM's prefix cache
    reuse: tuple[tuple[ChunkKey, Chunk], ...] = ()
    loading: bool = False
    block_ids: list[int] = field(default_factory=list)
    receipt: dict[str, Any] | None = None
    family: "Family | None" = None
    follows: bool = False  # an earlier member of its family has completed the prompt
    storage: FromStorage = field(default_factory=FromStorage)


@dataclass
class Family:
    """State of a family.

    `annotations` are those of its first member; all members have its prompt. `first` is the block from which on the
    family's KV is its own, None until a member was corrected; `reason` is why its first member was computed exactly.
    """

    plan: Tracked
    annotations: Annotations
    first: int | None = None
    reason: str = ""
    secret: bytes = field(default_factory=new_secret)

    def fits(self, annotations: Annotations, token_ids: Sequence[int]) -> bool:
        """Whether a request with these annotations and tokens continues the family's prompt."""
        plan = self.plan.plan
        return (
            annotations == self.annotations
            and plan is not None
            and plan.prompt.token_ids == tuple(token_ids[: self.plan.rows])
        )

    def corrected_from(self, first: int) -> None:
        """Record that a member's rows from block `first` on are completed by reuse."""
        if self.first is not None and first < self.first:
            self.secret = new_secret()
        self.first = first if self.first is None else min(first, self.first)

    def exactly(self) -> Tracked | None:
        """State of a later member if the first was computed exactly: only the slots it crosses; None without slots."""
        if self.plan.slots is None:
            return None
        return replace(
            self.plan, block_ids=[], retained=True, follows=True, family=self, reason=AS_FAMILY, storage=FromStorage()
        )

    def join(self, request) -> Tracked:
        """State of a later member; its vLLM `request` looks up the family's blocks from now on."""
        member = replace(
            self.plan, block_ids=[], exact=False, retained=True, follows=True, family=self, storage=FromStorage()
        )
        if member.schema:
            request.skip_reading_prefix_cache = False  # all its blocks are the family's, at the schema's positions
        key_apart(request, self.first, self.secret)
        return member
