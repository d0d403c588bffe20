"""EPIC (PIC, arXiv 2410.15332): isolated chunks; the first and last 32 rows of each are recomputed."""

from cacheslide.core.keys import ContentKeying
from cacheslide.core.placement import Placement
from cacheslide.policies.base import ReusePolicy
from cacheslide.policies.edges import EdgeTokens
from cacheslide.policies.encodings import Isolated

EDGE = 32  # the paper's setting, section 5


def delta() -> ReusePolicy:
    """Cached keys are re-rotated to their new positions."""
    return ReusePolicy(
        "epic",
        "EPIC",
        keying=ContentKeying(),
        encoding=Isolated(),
        placement=Placement("delta"),
        correction=EdgeTokens(EDGE, EDGE),
    )


def stale() -> ReusePolicy:
    """Cached keys keep the positions of their isolated encoding."""
    return ReusePolicy(
        "epic_stale",
        "EPIC, stale positions",
        keying=ContentKeying(),
        encoding=Isolated(),
        placement=Placement("stored"),
        correction=EdgeTokens(EDGE, EDGE),
    )
