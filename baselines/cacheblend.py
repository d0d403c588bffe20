"""CacheBlend (PIC, EuroSys '25, arXiv 2405.16444): isolated chunks; 18 % of tokens, which deviate most, are recomputed.

The paper narrows the set from layer to layer (`gradual`); its public code (YaoJiayi/CacheBlend) chooses once, at layer
1, by values (`code`); LMCache and UCM, which go on from it, choose once by keys (`delta`).
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
    """As the paper describes it: slightly more at the first layer that compares, ever fewer of these behind it."""
    return ReusePolicy(
        "cacheblend_gradual",
        "CacheBlend, gradual filtering",
        keying=ContentKeying(),
        encoding=Isolated(),
        placement=Placement("delta"),
        correction=GradualFiltering(SHARE),
    )


def code() -> ReusePolicy:
    """As the public code does it: one check layer, where all fresh K and V are still used, and values decide."""
    return ReusePolicy(
        "cacheblend_code",
        "CacheBlend, as its code",
        keying=ContentKeying(),
        encoding=Isolated(),
        placement=Placement("delta"),
        correction=GradualFiltering(SHARE, steps=1),
    )
