"""CacheBlend (PIC, EuroSys '25): isolated chunks; the 18 % of rows that deviate most are recomputed."""

from cacheslide.core.keys import ContentKeying
from cacheslide.core.placement import Placement
from cacheslide.policies.base import ReusePolicy
from cacheslide.policies.encodings import Isolated
from cacheslide.policies.top_deviation import TopDeviation

SHARE = 0.18  # the paper's setting, section 5


def delta() -> ReusePolicy:
    """Cached keys are re-rotated to their new positions, as LMCache and UCM do."""
    return ReusePolicy(
        "cacheblend",
        "CacheBlend",
        keying=ContentKeying(),
        encoding=Isolated(),
        placement=Placement("delta"),
        correction=TopDeviation(SHARE),
    )


def stale() -> ReusePolicy:
    """Cached keys keep the positions of their isolated encoding (the paper's reading of PIC)."""
    return ReusePolicy(
        "cacheblend_stale",
        "CacheBlend, stale positions",
        keying=ContentKeying(),
        encoding=Isolated(),
        placement=Placement("stored"),
        correction=TopDeviation(SHARE),
    )
