"""Systems that requests name, with their ratio and layer: cached, so that varied values cost little."""

from functools import lru_cache

from cacheslide.errors import PolicyError
from cacheslide.policies.base import ReusePolicy
from cacheslide.policies.registry import load_policy, policy_names
from cacheslide.vllm.limits import shown


@lru_cache(maxsize=256)
def policy_of(name: str, recompute_ratio: float | None = None, layer: int | None = None) -> ReusePolicy:
    """A registered system with another recompute ratio and selection layer; cached, since every request calls it.

    A new ratio or layer costs microseconds, and so does an unknown name. A system is looked up once: `register` it
    before its first request.
    """
    policy = _registered(name)
    policy = policy if recompute_ratio is None else policy.at_ratio(float(recompute_ratio))
    return policy if layer is None else policy.at_layer(layer)


@lru_cache(maxsize=256)
def _registered(name: str) -> ReusePolicy:
    known = policy_names()
    if known and name not in known:
        raise PolicyError(f"unknown system {shown(name)} (known: {', '.join(known)})")
    try:
        return load_policy(name)
    except PolicyError:
        raise
    except Exception as error:  # a third party's entry point may raise any exception
        raise PolicyError(f"the system {name!r} does not load ({type(error).__name__}: {error})") from error


def check_served(policy: ReusePolicy, layers: int | None = None) -> None:
    """Raise PolicyError for a system that serving cannot run, or that a model of `layers` layers cannot."""
    if policy.memory.name:
        raise PolicyError(
            f"{policy.name} keeps notes beside its chunks ({policy.memory.name}), which vLLM's workers do not: it runs "
            "in the reference host only"
        )
    if layers is not None:
        policy.check(layers)
