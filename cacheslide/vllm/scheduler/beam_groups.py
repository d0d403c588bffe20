"""Requests that continue one prompt share its corrected KV: the steps of a beam search.

vLLM's beam search sends a new request for every beam and token. The first one completes the prompt by reuse; its blocks
carry a secret of the family (`prefix_cache.py`), so that vLLM's own prefix cache hands them to the later ones and to
nobody else. What the first request's decision was, exact or corrected, holds for the whole family.
"""

from collections import OrderedDict
from dataclasses import replace

from cacheslide.vllm.options import Annotations
from cacheslide.vllm.scheduler.request_state import Family, FromStorage, Tracked

_KNOWN = 256  # families remembered; a forgotten one plans, and completes its prompt, once more


class Families:
    """The latest families, by tenant and name."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str], Family] = OrderedDict()

    def get(self, tenant: str, name: str) -> Family | None:
        """The family, if it is known."""
        if (tenant, name) in self._known:
            self._known.move_to_end((tenant, name))
        return self._known.get((tenant, name))

    def add(self, tenant: str, name: str, plan: Tracked, annotations: Annotations) -> Family:
        """A new family, whose first member with these `annotations` is planned as `plan`."""
        self._known[tenant, name] = family = Family(
            replace(plan, storage=FromStorage()), annotations, reason=plan.reason
        )
        while len(self._known) > _KNOWN:
            self._known.popitem(last=False)
        return family

    def clear(self) -> None:
        """Forget all of them."""
        self._known.clear()
