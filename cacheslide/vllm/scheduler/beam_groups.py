"""Families: requests that continue one prompt and share its corrected KV, as the steps of a beam search do.

vLLM's beam search sends a new request for every beam and token. The first one completes the prompt by reuse; its blocks
carry the family's secret (`prefix_cache.py`), so vLLM's prefix cache gives them to the family's later requests only.
The first request's outcome, exact or corrected, holds for the whole family.
"""

from collections import OrderedDict
from dataclasses import replace

from cacheslide.vllm.options import Annotations
from cacheslide.vllm.scheduler.request_state import Family, FromStorage, Tracked

_KNOWN = 256  # families remembered; a forgotten one is planned, and its prompt completed, once more


class Families:
    """The latest families by tenant and name."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str], Family] = OrderedDict()

    def get(self, tenant: str, name: str) -> Family | None:
        """The family, or None if unknown."""
        if (tenant, name) in self._known:
            self._known.move_to_end((tenant, name))
        return self._known.get((tenant, name))

    def add(self, tenant: str, name: str, plan: Tracked, annotations: Annotations) -> Family:
        """Add a family whose first member has these `annotations` and the plan `plan`."""
        self._known[tenant, name] = family = Family(
            replace(plan, storage=FromStorage()), annotations, reason=plan.reason
        )
        while len(self._known) > _KNOWN:
            self._known.popitem(last=False)
        return family

    def clear(self) -> None:
        """Remove all families."""
        self._known.clear()
