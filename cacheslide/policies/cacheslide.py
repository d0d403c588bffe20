"""CacheSlide: fixed-chain keys, delta rotation, WCA; a CoPE model rotates by angle 0 and takes the same policies."""

from dataclasses import replace

from cacheslide.core.keys import FixedChainKeying
from cacheslide.core.placement import Placement
from cacheslide.policies.base import ReusePolicy
from cacheslide.policies.encodings import FixedChain, InPrompt
from cacheslide.policies.first_tokens import FirstTokens
from cacheslide.policies.mixed import MixedTokens
from cacheslide.policies.overlap import OverlapTokens
from cacheslide.policies.remembered import RememberedDeviation
from cacheslide.policies.top_deviation import Promotion, TopDeviation

SHARE = 0.26  # the paper's recommendation, Fig. 14


def canonical() -> ReusePolicy:
    """Chunks encoded in the chain of fixed chunks alone, so that their KV depends on no turn's updates."""
    return ReusePolicy(
        "cacheslide",
        "CacheSlide",
        keying=FixedChainKeying(),
        encoding=FixedChain(),
        placement=Placement("delta"),
        correction=TopDeviation(SHARE),
    )


def first_turn() -> ReusePolicy:
    """Chunks encoded in the first prompt they appear in, as the paper's Algorithm 1 stores them."""
    return ReusePolicy(
        "cacheslide_first_turn",
        "CacheSlide, first-turn encoding",
        keying=FixedChainKeying(),
        encoding=InPrompt(),
        placement=Placement("delta"),
        correction=TopDeviation(SHARE),
    )


def promoting() -> ReusePolicy:
    """A small first selection, then more rows one layer later, restarted from their cached layer inputs.

    One early step is the best form of the sweep in results/wca: each further step runs every resting row once.
    """
    return ReusePolicy(
        "cacheslide_promote",
        "CacheSlide, promotion",
        keying=FixedChainKeying(),
        encoding=FixedChain(),
        placement=Placement("delta"),
        correction=TopDeviation(0.10, promote=(Promotion(1, SHARE - 0.10),)),
    )


def first_tokens() -> ReusePolicy:
    """First-turn encoding; the first tenth of the reused text is recomputed from layer 0, without a selection layer."""
    return replace(
        first_turn(), name="cacheslide_first", title="CacheSlide, first tokens", correction=FirstTokens(0.10)
    )


def remembering() -> ReusePolicy:
    """First-turn encoding; the tenth of the reused text with the highest remembered deviation is recomputed."""
    return replace(
        first_turn(),
        name="cacheslide_remember",
        title="CacheSlide, remembered deviation",
        correction=RememberedDeviation(0.10),
    )


def overlapping() -> ReusePolicy:
    """First-turn encoding; a tenth is recomputed: half first tokens, half by overlap with the updated text."""
    return replace(
        first_turn(),
        name="cacheslide_overlap",
        title="CacheSlide, first tokens and overlap",
        correction=OverlapTokens(0.10, lead=0.5),
    )


def mixing() -> ReusePolicy:
    """First-turn encoding; a tenth by remembered deviation and a twentieth by overlap with the updated text."""
    return replace(
        first_turn(),
        name="cacheslide_mixed",
        title="CacheSlide, remembered deviation and overlap",
        correction=MixedTokens(0.15, remembered=2 / 3, overlap=1 / 3),
    )
