"""What the scheduler's half knows about one request."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cacheslide.core.engine import Plan
from cacheslide.core.keys import CacheIdentity, ChunkKey
from cacheslide.core.prompt import Chunk
from cacheslide.policies.base import ReusePolicy
from cacheslide.positions.ccpe import PromptSlots

if TYPE_CHECKING:
    from cacheslide.vllm.scheduler.beam_groups import Family


@dataclass
class FromBelow:
    """What a request has to do with chunks below memory (cold.py).

    The look-up under way, where each chunk lies ("" for nowhere), which reads were asked for, the chunks that wait with
    it, the tier and bytes of those that came, why others did not, and whether a fault has ended all this.
    """

    lookup: Future[dict[ChunkKey, str]] | None = None
    since: float = 0.0  # of the look-up, monotonic seconds
    places: dict[ChunkKey, str] = field(default_factory=dict)
    tried: set[ChunkKey] = field(default_factory=set)
    leased: set[ChunkKey] = field(default_factory=set)
    tiers: dict[ChunkKey, tuple[str, int]] = field(default_factory=dict)
    failures: dict[ChunkKey, str] = field(default_factory=dict)
    faulty: bool = False  # nothing more is looked for


@dataclass
class Tracked:
    """A marked request from its arrival to its end."""

    rows: int
    system: str
    reason: str = ""  # why it is computed exactly
    policy: ReusePolicy | None = None
    plan: Plan | None = None
    encode: str = "later"
    slots: PromptSlots | None = None  # that a calibrated CoPE model crosses
    schema: bool = False  # its rows' positions are not their indices
    exact: bool = True  # every row so far was computed by vLLM itself
    identity: CacheIdentity | None = None
    spans: tuple[tuple[int, int], ...] = ()  # fixed, in tokens
    history: int | None = None  # rows from here on are fixed text of the next turn
    generation: int = 0  # the highest one of the chunks it reuses
    note: str = ""
    kept: bool = False
    start: int = 0  # rows before it come from vLLM's prefix cache
    reuse: tuple[tuple[ChunkKey, Chunk], ...] = ()
    loading: bool = False
    block_ids: list[int] = field(default_factory=list)
    receipt: dict[str, Any] | None = None
    family: "Family | None" = None
    follows: bool = False  # an earlier member of its family has completed the prompt
    below: FromBelow = field(default_factory=FromBelow)
