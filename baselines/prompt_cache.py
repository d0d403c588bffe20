"""PromptCache (PDC, arXiv 2311.04934): fixed text has KV at the positions that a schema assigns.

The paper encodes modules in isolation, as does the CacheSlide paper's comparison (`policy`). Its public code encodes
all modules of a schema in one pass, each attending to earlier ones (`joint`). The slot size, the positions reserved for
an updated segment, determines how often either can reuse: text that needs another number of slots shifts all text after
it, which is then recomputed.
"""

from functools import partial

from baselines.joint_modules import JointModules
from cacheslide.core.keys import ContentKeying, FixedChainKeying
from cacheslide.core.placement import Placement
from cacheslide.policies.base import ReusePolicy
from cacheslide.policies.encodings import Isolated

SLOT = 256  # positions a schema reserves for an updated segment, in multiples; one stored copy per position
SLOTS = (16, 32, 64, 128)  # other slot sizes of the sweep


def policy() -> ReusePolicy:
    """No attention between modules and no correction, as in the paper's comparison."""
    return ReusePolicy(
        "prompt_cache",
        "PromptCache",
        keying=ContentKeying(positioned=True),
        encoding=Isolated(at_slot=True),
        placement=Placement("stored", slot=SLOT),
    )


def joint(slot: int = SLOT) -> ReusePolicy:
    """Modules encoded jointly; slots of another size than `SLOT` are part of the name."""
    name, title = "prompt_cache_joint", "PromptCache, joint"
    return ReusePolicy(
        name if slot == SLOT else f"{name}_{slot}",
        title if slot == SLOT else f"{title}, slot {slot}",
        keying=FixedChainKeying(positioned=True),
        encoding=JointModules(),
        placement=Placement("stored", slot=slot),
    )


joint_16, joint_32, joint_64, joint_128 = (partial(joint, slot) for slot in SLOTS)
