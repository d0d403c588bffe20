"""CacheSlide: reuse of the KV cache of fixed prompt segments whose position slides from turn to turn."""

from cacheslide.engine import Prefilled, Receipt, ReuseEngine
from cacheslide.errors import CacheSlideError
from cacheslide.policy import ReusePolicy, load_policy, policy_names
from cacheslide.prompt import Prompt, Role, Segment

__version__ = "0.1.0"
__all__ = [
    "CacheSlideError",
    "Prefilled",
    "Prompt",
    "Receipt",
    "ReuseEngine",
    "ReusePolicy",
    "Role",
    "Segment",
    "load_policy",
    "policy_names",
]
