"""ContextCache (PDC): prefix caching. Chunks match only when everything before them is the same."""

from cacheslide.keys import PrefixKeying
from cacheslide.placement import Placement
from cacheslide.policy import ReusePolicy


def policy() -> ReusePolicy:
    """Exact: a prefix's KV depends on nothing else. With an updated segment behind it only the system prompt hits."""
    return ReusePolicy("context_cache", "ContextCache", keying=PrefixKeying(), placement=Placement("stored"))
