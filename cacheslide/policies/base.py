"""A reuse policy is four choices: keying, encoding, placement, correction. Systems register by entry point.

The harness, the store and the serving adapter know no system by name: a package adds one through the entry-point
group `cacheslide.policies`, whose objects are functions without arguments that return a `ReusePolicy`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from typing import Literal

from cacheslide.core.keys import FixedChainKeying, Keying, NoKeying, PrefixKeying
from cacheslide.core.placement import Placement
from cacheslide.core.prompt import Prompt
from cacheslide.errors import PolicyError
from cacheslide.policies.correction import Correction, NoCorrection, Promotion, TopDeviation

GROUP = "cacheslide.policies"


@dataclass(frozen=True)
class Encoding:
    """In what context a chunk's KV is computed.

    "in_prompt": in the prompt it was first seen in; "fixed_chain": behind the fixed chunks before it, without
    any updated segment (canonical: it does not matter which turn filled the cache); "isolated": alone, from
    position 0, or from its own position in the schema with `at_slot`.
    """

    kind: Literal["in_prompt", "fixed_chain", "isolated"] = "in_prompt"
    at_slot: bool = False

    @property
    def name(self) -> str:
        """Part of every chunk key, and the name of the caches a workflow builds."""
        return f"{self.kind}_at_slot" if self.at_slot else self.kind


def unchanged(prompt: Prompt) -> Prompt:
    """The prompt transform of every policy but window padding."""
    return prompt


@dataclass(frozen=True)
class ReusePolicy:
    """One system of the study.

    `transform` rewrites the prompt before anything else (window padding); `title` is what figures print.
    """

    name: str
    title: str
    keying: Keying = field(default_factory=NoKeying)
    encoding: Encoding = field(default_factory=Encoding)
    placement: Placement = field(default_factory=Placement)
    correction: Correction = field(default_factory=NoCorrection)
    transform: Callable[[Prompt], Prompt] = unchanged

    def __post_init__(self) -> None:
        if self.encoding.kind == "fixed_chain" and not isinstance(self.keying, FixedChainKeying):
            raise PolicyError(f"{self.name}: a fixed-chain encoding needs the fixed-chain keying")
        if self.encoding.kind == "in_prompt" and not isinstance(
            self.keying, NoKeying | PrefixKeying | FixedChainKeying
        ):
            raise PolicyError(f"{self.name}: KV encoded in a prompt must be keyed by what came before it")
        if self.encoding.at_slot and not self.placement.slot:
            raise PolicyError(f"{self.name}: encoding at slots needs a placement with slots")

    @property
    def reuses(self) -> bool:
        """Whether anything can ever match."""
        return not isinstance(self.keying, NoKeying)

    @property
    def recipe(self) -> str:
        """Names the chunk caches this policy reads; policies of equal recipe share them."""
        if not self.reuses:
            return "none"
        slot = f"_slot{self.placement.slot}" if self.placement.slot else ""
        moved = "" if self.transform is unchanged else f"_{self.name}"
        return f"{type(self.keying).__name__.removesuffix('Keying').lower()}_{self.encoding.name}{slot}{moved}"

    @property
    def probe_layers(self) -> frozenset[int]:
        """Layers whose inputs its chunks must hold (promotion restarts rows from them)."""
        rule = self.correction
        return frozenset(p.layer for p in rule.promote) if isinstance(rule, TopDeviation) else frozenset()

    def at_layer(self, layer: int) -> "ReusePolicy":
        """The same policy selecting at `layer`; promotion layers below it move up to it."""
        if not isinstance(self.correction, TopDeviation):
            return self
        first = self.correction.promote[0].layer if self.correction.promote else layer
        shift = max(0, layer - first)
        promote = tuple(Promotion(p.layer + shift, p.share) for p in self.correction.promote)
        return replace(self, correction=replace(self.correction, layer=layer, promote=promote))

    def at_share(self, share: float) -> "ReusePolicy":
        """The same policy recomputing `share` of the reused rows (where it recomputes any)."""
        return replace(self, correction=self.correction.at_share(share))


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


def check_policy(policy: ReusePolicy, layers: int) -> None:
    """Raise PolicyError for a system that this model of `layers` layers cannot run."""
    rule = policy.correction
    if not isinstance(rule, TopDeviation):
        return
    last = max([rule.layer, *(p.layer for p in rule.promote)])
    if last >= layers:
        raise PolicyError(f"{policy.name} selects at layer {last}, but the model has layers 0 to {layers - 1}")
