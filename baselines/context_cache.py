"""ContextCache (PDC): prefix caching. Chunks match only if all text before them is the same."""

from cacheslide.core.keys import PrefixKeying
from cacheslide.core.placement import Placement
from cacheslide.policies.base import ReusePolicy


def policy() -> ReusePolicy:
    """Exact, since a prefix's KV depends on nothing else. If updated text follows the system prompt, only that hits."""
    return ReusePolicy("context_cache", "ContextCache", keying=PrefixKeying(), placement=Placement("stored"))
