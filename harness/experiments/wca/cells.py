"""Cells of the sweep of WCA's open points: one for each reading of the paper (sections 4.2 and 4.3).

Every cell changes one setting of the default: `cacheslide` as registered, at one selection layer. The paper leaves open
how old and new KV are merged, what "converged" means, where deviations are compared, what a row that enters late starts
from, and in what context cached chunks were encoded; promotion is this project's own alternative to the swap.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from cacheslide.core.keys import ContentKeying
from cacheslide.policies.base import ReusePolicy
from cacheslide.policies.encodings import Isolated
from cacheslide.policies.none import NoCorrection
from cacheslide.policies.registry import load_policy
from cacheslide.policies.top_deviation import Promotion, Swap, TopDeviation

EARLY, LATE = 2, 4  # layers (0-based) at which single points are changed: before and after links are resolved
SHARES = (0.10, 0.26, 0.50)
TAU = 0.12  # the paper's recommendation


@dataclass(frozen=True)
class Cell:
    """One setting: `factor` is the varied point, `option` its value, `base` the cell that differs only in it.

    `capture` names layers whose inputs its chunks must hold. With `asks`, questions are part of the prompt: a prefill
    each, for rules that look at them.
    """

    name: str
    factor: str
    option: str
    policy: ReusePolicy
    base: str | None = None
    capture: frozenset[int] = field(default_factory=frozenset)
    asks: bool = False

    def describe(self) -> dict[str, Any]:
        """The cell as fields of a table row."""
        rule = self.policy.correction
        selects = rule.selection_layer is not None
        about = {"layer": rule.selection_layer, "recompute_ratio": rule.total_ratio} if selects else {}
        return {"factor": self.factor, "option": self.option, "base": self.base, **about}


def cells(num_layers: int) -> list[Cell]:
    """Every cell that a model of `num_layers` layers can run; the others are compared with its "recompute"."""
    found = [Cell("recompute", "reference", "recompute", load_policy("recompute")), *_changes(num_layers)]
    names = {c.name for c in found}
    return [c if c.base in names else replace(c, base=None) for c in found]


def default(layer: int, recompute_ratio: float) -> str:
    """The name of the default cell at a layer and recompute ratio."""
    return f"layer {layer}, {recompute_ratio:.0%}"


def contexts() -> dict[str, ReusePolicy]:
    """The default policy over chunks encoded in three contexts."""
    base = load_policy("cacheslide")
    return {
        "chain of fixed chunks": base,
        "first turn": load_policy("cacheslide_first_turn"),
        "isolated": replace(base, keying=ContentKeying(), encoding=Isolated()),
    }


def _changes(layers: int) -> Iterator[Cell]:
    base, recompute_ratio = load_policy("cacheslide"), load_policy("cacheslide").correction.recompute_ratio

    def cell(factor: str, option: str, layer: int, policy: ReusePolicy = base, inputs: bool = False, **change) -> Cell:
        rule = TopDeviation(**{"recompute_ratio": recompute_ratio, "layer": layer} | change)
        kept = {p.layer for p in rule.promote} | (set(range(layer, layers)) if inputs else set())
        name = f"{factor}: {option}, layer {layer}"
        done = replace(policy, name=name, correction=rule)
        return Cell(name, factor, option, done, default(layer, recompute_ratio), frozenset(kept))

    for context, policy in contexts().items():
        plain = replace(policy, name=f"no correction, {context}", correction=NoCorrection())
        yield Cell(plain.name, "no correction", context, plain)
    for layer in range(min(LATE + 1, layers)):
        for part in SHARES:
            made = cell("selection layer", f"{part:.0%}", layer, recompute_ratio=part)
            name = default(layer, part)
            yield replace(made, name=name, policy=replace(made.policy, name=name), base=None)
    for layer in [i for i in (EARLY, LATE) if i < layers]:
        yield cell("fusion", "the paper's α", layer, fusion="paper")
        yield cell("fusion", "d² / (d² + median)", layer, fusion="wiener")
        for weight in (0.75, 0.5):
            yield cell("fusion", f"α = {weight}", layer, fusion="constant", constant=weight)
        if layer + 2 < layers:
            yield cell("gate and swap", f"1 - CKSim < {TAU}, every 2", layer, swap=Swap(TAU, 2))
        for context in ("first turn", "isolated"):
            yield cell("encoding", context, layer, contexts()[context])
        yield cell("metric", "V", layer, metric="v")
        yield cell("metric", "K and V", layer, metric="kv")
    for at, (how, every, inputs) in {
        f"CKSim < {TAU} as printed, every 4": (Swap(TAU, 4, "literal"), 4, False),
        f"1 - CKSim < {TAU}, every 4": (Swap(TAU, 4), 4, False),
        "1 - CKSim < 0.05, every 2": (Swap(0.05, 2), 2, False),
        "1 - CKSim < 0.5, every 2": (Swap(0.5, 2), 2, False),
        f"1 - CKSim < {TAU}, every layer": (Swap(TAU, 1), 1, False),
        f"1 - CKSim < {TAU}, every 2, from cached inputs": (Swap(TAU, 2, start="inputs"), 2, True),
    }.items():
        if EARLY + every < layers:
            yield cell("gate and swap", at, EARLY, inputs=inputs, swap=how)
    for layer in range(1, min(LATE + 1, layers - 1)):
        yield cell("promotion", "10 % + 3 × 5 %", layer, recompute_ratio=0.10, promote=_steps(layer, 3, 0.05, layers))
    if layers > EARLY + 1:
        yield cell("promotion", "10 % + 16 %", EARLY, recompute_ratio=0.10, promote=_steps(EARLY, 1, 0.16, layers))
        yield cell("promotion", "26 % + 3 × 5 %", EARLY, promote=_steps(EARLY, 3, 0.05, layers))


def _steps(first: int, count: int, recompute_ratio: float, layers: int) -> tuple[Promotion, ...]:
    return tuple(Promotion(i, recompute_ratio) for i in range(first, min(first + count, layers - 1)))
