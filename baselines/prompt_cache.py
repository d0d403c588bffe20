"""PromptCache (PDC, arXiv 2311.04934): modules encoded in isolation at schema-assigned positions."""

from cacheslide.core.keys import ContentKeying
from cacheslide.core.placement import Placement
from cacheslide.policies.base import ReusePolicy
from cacheslide.policies.encodings import Isolated

SLOT = 256  # positions a schema reserves for an updated segment, in multiples; one stored copy per position


def policy() -> ReusePolicy:
    """No attention between modules and no correction, as in the paper's comparison."""
    return ReusePolicy(
        "prompt_cache",
        "PromptCache",
        keying=ContentKeying(positioned=True),
        encoding=Isolated(at_slot=True),
        placement=Placement("stored", slot=SLOT),
    )
