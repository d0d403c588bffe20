"""ContextCache (PDC): prefix caching. Chunks match only when everything before them is the same."""

from cacheslide.core.keys import PrefixKeying
from cacheslide.core.placement import Placement
from cacheslide.policies.base import ReusePolicy


def policy() -> ReusePolicy:
    """Exact: a prefix's KV depends on nothing else. With an updated segment behind it only the system prompt hits."""
    return ReusePolicy("context_cache", "ContextCache", keying=PrefixKeying(), placement=Placement("stored"))
