"""The systems of a run: registered policies with the run's selection layer, recompute ratio and window applied."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cacheslide.policies.base import Correction, ReusePolicy
from cacheslide.policies.registry import load_policy


@dataclass(frozen=True)
class Vanilla:
    """vLLM without connector and annotations; needs `backend: vllm`."""

    name: str
    title: str
    prefix_caching: bool

    @property
    def reuses(self) -> bool:
        """False: it reads no chunk caches."""
        return False


System = ReusePolicy | Vanilla
COPE = "_cope"  # suffix of a policy's name: the same policy on the model's CoPE adapter
VANILLA = {
    s.name: s for s in (Vanilla("vllm", "vLLM", False), Vanilla("vllm_prefix_cache", "vLLM, prefix cache", True))
}


def on_cope(names: Iterable[str]) -> list[str]:
    """Names of the policies `names` when they run on the CoPE model."""
    return [f"{name}{COPE}" for name in names]


def cope_systems(config: Mapping[str, Any]) -> list[str]:
    """The systems that run on the CoPE model; none when the configuration names no adapter."""
    return on_cope(config["cope"]["systems"]) if "cope" in config else []


def policy_of(name: str) -> ReusePolicy:
    """The registered policy of a system's name; on the CoPE model with the system's name and title."""
    policy = load_policy(name.removesuffix(COPE))
    return replace(policy, name=name, title=f"{policy.title}, CoPE") if name.endswith(COPE) else policy


def resolve(names: Iterable[str], layer: int | None = None, recompute_ratio: float | None = None) -> list[System]:
    """Load systems by name; `layer` is the common selection layer, `recompute_ratio` that of every system."""
    out: list[System] = []
    for name in names:
        if name in VANILLA:
            out.append(VANILLA[name])
            continue
        policy = policy_of(name)
        if layer is not None:
            policy = policy.at_layer(first_look(policy, layer))
        if recompute_ratio is not None:
            policy = policy.at_ratio(recompute_ratio)
        out.append(policy)
    return out


def first_look(policy: ReusePolicy, layer: int) -> int:
    """The layer at which `policy` first selects in a run whose common selection layer is `layer`.

    It is `layer`; with promotion, half of it, because a second selection follows: on the validation split this costs
    0.61 of the row-layers; promotion from the common layer costs 0.92 and one selection there 0.69 (results/wca).
    """
    return max(min(layer, 1), layer // 2) if policy.probe_layers else layer


def scalable(names: Iterable[str]) -> list[str]:
    """The systems whose number of recomputed rows can be set, which are compared at an equal ratio."""
    return [n for n in names if n not in VANILLA and _rule(n, 0.5) != _rule(n, 0.25)]


def to_scale(names: Iterable[str], recompute_ratio: float) -> list[str]:
    """The scalable systems whose own recompute ratio differs from this one, to be run again at it."""
    return [n for n in scalable(names) if _rule(n, recompute_ratio) != policy_of(n).correction]


def _rule(name: str, recompute_ratio: float) -> Correction:
    return policy_of(name).at_ratio(recompute_ratio).correction


def recipes(policies: Sequence[System]) -> dict[str, tuple[ReusePolicy, frozenset[int]]]:
    """For each kind of chunk cache: one policy that can build it, and the layer inputs its readers need.

    The policy keeps scores with chunks if a reader needs scores.
    """
    out: dict[str, tuple[ReusePolicy, frozenset[int]]] = {}
    for policy in policies:
        if policy.reuses:
            builder, layers = out.get(policy.recipe, (policy, frozenset()))
            builder = policy if policy.needs_scores else builder
            out[policy.recipe] = builder, layers | policy.probe_layers
    return out
