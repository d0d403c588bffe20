"""The systems of a run: registered policies with the run's selection layer, share and window applied."""

from collections.abc import Iterable, Sequence

from cacheslide.correction import Correction
from cacheslide.policy import ReusePolicy, load_policy


def resolve(names: Iterable[str], layer: int | None = None, share: float | None = None) -> list[ReusePolicy]:
    """Load policies by name; `layer` is the common selection layer, `share` an equal share of recomputed rows."""
    out = []
    for name in names:
        policy = load_policy(name)
        if layer is not None:
            policy = policy.at_layer(layer)
        if share is not None:
            policy = policy.at_share(share)
        out.append(policy)
    return out


def scalable(names: Iterable[str]) -> list[str]:
    """Those systems whose number of recomputed rows can be set: the ones an equal-share comparison is about."""
    return [n for n in names if _rule(n, 0.5) != _rule(n, 0.25)]


def to_scale(names: Iterable[str], share: float) -> list[str]:
    """The scalable systems that do not recompute `share` by themselves: those worth running again at that share."""
    return [n for n in scalable(names) if _rule(n, share) != load_policy(n).correction]


def _rule(name: str, share: float) -> Correction:
    return load_policy(name).at_share(share).correction


def recipes(policies: Sequence[ReusePolicy]) -> dict[str, tuple[ReusePolicy, frozenset[int]]]:
    """For each kind of chunk cache: one policy that can build it, and the layer inputs its readers need."""
    out: dict[str, tuple[ReusePolicy, frozenset[int]]] = {}
    for policy in policies:
        if policy.reuses:
            builder, layers = out.get(policy.recipe, (policy, frozenset()))
            out[policy.recipe] = builder, layers | policy.probe_layers
    return out
