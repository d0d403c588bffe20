"""CacheBlend (PIC, EuroSys '25, arXiv 2405.16444): isolated chunks; the 18 % most deviating tokens are recomputed.

The paper narrows the set from layer to layer (`gradual`); its public code (YaoJiayi/CacheBlend) chooses once, at layer
1, by values (`code`); LMCache and UCM, which are derived from it, choose once by keys (`delta`).
"""

from baselines.gradual_filtering import GradualFiltering
from cacheslide.core.keys import ContentKeying
from cacheslide.core.placement import Placement
from cacheslide.policies.base import ReusePolicy
from cacheslide.policies.encodings import Isolated
from cacheslide.policies.top_deviation import TopDeviation

SHARE = 0.18  # of the authors' runs, and of the CacheSlide paper's


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


def gradual() -> ReusePolicy:
    """As in the paper: slightly more tokens than the ratio at the first comparing layer, fewer at each later one."""
    return ReusePolicy(
        "cacheblend_gradual",
        "CacheBlend, gradual filtering",
        keying=ContentKeying(),
        encoding=Isolated(),
        placement=Placement("delta"),
        correction=GradualFiltering(SHARE),
    )


def code() -> ReusePolicy:
    """As in the public code: one check layer, selection by values; all fresh K and V are still used at that layer."""
    return ReusePolicy(
        "cacheblend_code",
        "CacheBlend, as its code",
        keying=ContentKeying(),
        encoding=Isolated(),
        placement=Placement("delta"),
        correction=GradualFiltering(SHARE, steps=1),
    )
