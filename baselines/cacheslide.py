"""CacheSlide on a stock RoPE model (RPDC): fixed-chain keys, delta rotation, WCA.

The CoPE variants, with the canonical encodings of CCPE, join this file.
"""

from cacheslide.correction import Promotion, TopDeviation
from cacheslide.keys import FixedChainKeying
from cacheslide.placement import Placement
from cacheslide.policy import Encoding, ReusePolicy

SHARE = 0.26  # the paper's recommendation, Fig. 14


def canonical() -> ReusePolicy:
    """Chunks encoded in the chain of fixed chunks alone, so that no turn's updates are baked into them."""
    return ReusePolicy(
        "cacheslide",
        "CacheSlide",
        keying=FixedChainKeying(),
        encoding=Encoding("fixed_chain"),
        placement=Placement("delta"),
        correction=TopDeviation(SHARE),
    )


def first_turn() -> ReusePolicy:
    """Chunks encoded in the first prompt they appear in, as the paper's Algorithm 1 stores them."""
    return ReusePolicy(
        "cacheslide_first_turn",
        "CacheSlide, first-turn encoding",
        keying=FixedChainKeying(),
        encoding=Encoding("in_prompt"),
        placement=Placement("delta"),
        correction=TopDeviation(SHARE),
    )


def promoting() -> ReusePolicy:
    """A small first selection, then more rows at later layers, restarted from their cached layer inputs."""
    return ReusePolicy(
        "cacheslide_promote",
        "CacheSlide, promotion",
        keying=FixedChainKeying(),
        encoding=Encoding("fixed_chain"),
        placement=Placement("delta"),
        correction=TopDeviation(0.10, promote=tuple(Promotion(layer, 0.05) for layer in (1, 2, 3))),
    )


def naive() -> ReusePolicy:
    """The lower bound of RPDC: KV from the first prompt, moved to its new position, nothing recomputed."""
    return ReusePolicy(
        "naive_reuse",
        "Naive reuse",
        keying=FixedChainKeying(),
        encoding=Encoding("in_prompt"),
        placement=Placement("delta"),
    )
