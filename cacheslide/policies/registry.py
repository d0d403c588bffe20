"""Looks up systems by name: packages register them through the entry-point group `cacheslide.policies`.

An entry is a function without arguments that returns a `ReusePolicy`. Engine, store and harness name no system.
`register` adds one for this process only, for scripts and tests.
"""

from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points

from cacheslide.errors import PolicyError
from cacheslide.policies.base import ReusePolicy

GROUP = "cacheslide.policies"
_own: dict[str, Callable[[], ReusePolicy]] = {}


@lru_cache(maxsize=1)
def _installed() -> dict[str, EntryPoint]:
    """Entry points by name; cached, since reading the metadata of all packages takes milliseconds."""
    return {e.name: e for e in entry_points(group=GROUP)}


def register(name: str, make: Callable[[], ReusePolicy]) -> None:
    """Register the system `name` in this process; it takes precedence over an installed one of that name."""
    _own[name] = make


def policy_names() -> list[str]:
    """The registered systems, sorted."""
    return sorted(_installed().keys() | _own.keys())


def load_policy(name: str) -> ReusePolicy:
    """The registered policy `name`; PolicyError listing the registered names if there is none."""
    if name not in policy_names():
        known = ", ".join(policy_names()) or "none: is the package installed?"
        raise PolicyError(f"unknown system {name!r} (known: {known})")
    policy = (_own[name] if name in _own else _installed()[name].load())()
    if not isinstance(policy, ReusePolicy):
        raise PolicyError(f"the entry point {name!r} returned {type(policy).__name__}, not a ReusePolicy")
    return policy
