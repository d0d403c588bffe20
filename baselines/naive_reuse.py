"""Naive reuse, the lower bound of RPDC: CacheSlide's keys and placement without recomputation."""

from cacheslide.core.keys import FixedChainKeying
from cacheslide.core.placement import Placement
from cacheslide.policies.base import ReusePolicy
from cacheslide.policies.encodings import InPrompt


def policy() -> ReusePolicy:
    """KV from the first prompt, moved to its new position."""
    return ReusePolicy(
        "naive_reuse",
        "Naive reuse",
        keying=FixedChainKeying(),
        encoding=InPrompt(),
        placement=Placement("delta"),
    )
