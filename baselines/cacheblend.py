"""CacheBlend (PIC, EuroSys '25): isolated chunks; the 18 % of rows that deviate most are recomputed."""

from cacheslide.correction import TopDeviation
from cacheslide.keys import ContentKeying
from cacheslide.placement import Placement
from cacheslide.policy import Encoding, ReusePolicy

SHARE = 0.18  # the paper's setting, section 5


def delta() -> ReusePolicy:
    """Cached keys are re-rotated to their new positions, as LMCache and UCM do."""
    return ReusePolicy(
        "cacheblend",
        "CacheBlend",
        keying=ContentKeying(),
        encoding=Encoding("isolated"),
        placement=Placement("delta"),
        correction=TopDeviation(SHARE),
    )


def stale() -> ReusePolicy:
    """Cached keys keep the positions of their isolated encoding (the paper's reading of PIC)."""
    return ReusePolicy(
        "cacheblend_stale",
        "CacheBlend, stale positions",
        keying=ContentKeying(),
        encoding=Encoding("isolated"),
        placement=Placement("stored"),
        correction=TopDeviation(SHARE),
    )
