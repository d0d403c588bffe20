"""Finds systems by name: packages register them through the entry-point group `cacheslide.policies`.

An entry is a function without arguments that returns a `ReusePolicy`. Engine, store and harness know no system by name.
`register` adds one for this process only: a script's own, or a test's.
"""

from collections.abc import Callable
from importlib.metadata import entry_points

from cacheslide.errors import PolicyError
from cacheslide.policies.base import ReusePolicy

GROUP = "cacheslide.policies"
_own: dict[str, Callable[[], ReusePolicy]] = {}


def register(name: str, make: Callable[[], ReusePolicy]) -> None:
    """Know the system `name` in this process; it goes before an installed one of that name."""
    _own[name] = make


def policy_names() -> list[str]:
    """The registered systems, sorted."""
    return sorted({e.name for e in entry_points(group=GROUP)} | _own.keys())


def load_policy(name: str) -> ReusePolicy:
    """The registered policy `name`; PolicyError naming the known ones when there is none."""
    makers = [_own[name]] if name in _own else [e.load() for e in entry_points(group=GROUP) if e.name == name]
    for make in makers:
        policy = make()
        if not isinstance(policy, ReusePolicy):
            raise PolicyError(f"the entry point {name!r} returned {type(policy).__name__}, not a ReusePolicy")
        return policy
    known = ", ".join(policy_names()) or "none: is the package installed?"
    raise PolicyError(f"unknown system {name!r} (known: {known})")
