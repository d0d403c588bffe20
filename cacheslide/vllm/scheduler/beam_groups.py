"""Requests that continue one prompt share its corrected KV: the steps of a beam search.

vLLM's beam search sends a new request for every beam and token. The first one completes the prompt by reuse; its blocks
carry a secret of the family (`prefix_cache.py`), so that vLLM's own prefix cache hands them to the later ones and to
nobody else. What the first request's decision was, exact or corrected, holds for the whole family.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cacheslide.vllm.options import Marks
from cacheslide.vllm.scheduler.prefix_cache import key_apart, new_secret
from cacheslide.vllm.scheduler.reasons import AS_FAMILY
from cacheslide.vllm.scheduler.request_state import FromBelow, Tracked

_KNOWN = 256  # families remembered; a forgotten one plans, and completes its prompt, once more


@dataclass
class Family:
    """What the scheduler's half keeps of a family.

    `marks` are those of its first member, whose prompt all members have. `first` is the block from which on its KV is
    its own, None before a member was corrected; `reason` says why its first member was computed exactly.
    """

    plan: Tracked
    marks: Marks
    first: int | None = None
    reason: str = ""
    secret: bytes = field(default_factory=new_secret)

    def fits(self, marks: Marks, token_ids: Sequence[int]) -> bool:
        """Whether a request with these marks and tokens continues the family's prompt."""
        plan = self.plan.plan
        return marks == self.marks and plan is not None and plan.prompt.token_ids == tuple(token_ids[: self.plan.rows])

    def corrected_from(self, first: int) -> None:
        """A member's rows from block `first` on are completed by reuse."""
        if self.first is not None and first < self.first:
            self.secret = new_secret()
        self.first = first if self.first is None else min(first, self.first)

    def exactly(self) -> Tracked | None:
        """What is tracked of a later member where the first one was computed exactly: the slots it crosses, if any."""
        if self.plan.slots is None:
            return None
        return replace(
            self.plan, block_ids=[], kept=True, follows=True, family=self, reason=AS_FAMILY, below=FromBelow()
        )

    def join(self, request) -> Tracked:
        """What is tracked of a later member, whose vLLM `request` looks up the family's blocks from now on."""
        member = replace(self.plan, block_ids=[], exact=False, kept=True, follows=True, family=self, below=FromBelow())
        if member.schema:
            request.skip_reading_prefix_cache = False  # all its blocks are the family's, at the schema's positions
        key_apart(request, self.first, self.secret)
        return member


class Families:
    """The latest families, by tenant and name."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str], Family] = OrderedDict()

    def get(self, tenant: str, name: str) -> Family | None:
        """The family, if it is known."""
        if (tenant, name) in self._known:
            self._known.move_to_end((tenant, name))
        return self._known.get((tenant, name))

    def add(self, tenant: str, name: str, plan: Tracked, marks: Marks) -> Family:
        """A new family, whose first member with these `marks` is planned as `plan`."""
        self._known[tenant, name] = family = Family(replace(plan, below=FromBelow()), marks, reason=plan.reason)
        while len(self._known) > _KNOWN:
            self._known.popitem(last=False)
        return family

    def clear(self) -> None:
        """Forget all of them."""
        self._known.clear()
