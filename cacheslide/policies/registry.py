"""Finds systems by name: packages register them through the entry-point group `cacheslide.policies`.

An entry is a function without arguments that returns a `ReusePolicy`. Engine, store and harness know no system by name.
"""

from importlib.metadata import entry_points

from cacheslide.errors import PolicyError
from cacheslide.policies.base import ReusePolicy

GROUP = "cacheslide.policies"


def policy_names() -> list[str]:
    """The registered systems, sorted."""
    return sorted({e.name for e in entry_points(group=GROUP)})


def load_policy(name: str) -> ReusePolicy:
    """The registered policy `name`; PolicyError naming the known ones when there is none."""
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            policy = entry.load()()
            if not isinstance(policy, ReusePolicy):
                raise PolicyError(f"the entry point {name!r} returned {type(policy).__name__}, not a ReusePolicy")
            return policy
    known = ", ".join(policy_names()) or "none: is the package installed?"
    raise PolicyError(f"unknown system {name!r} (known: {known})")
