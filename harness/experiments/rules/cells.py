"""Cells of the sweep of correction rules on the stress task: each rule at several ratios, over one kind of cache.

Chunks come from the previous turn. The baseline of a rule that begins at layer 0 is the first tokens at its ratio.
"""

from collections.abc import Iterator
from dataclasses import replace

from baselines.random_tokens import RandomTokens
from cacheslide.policies.base import Correction
from cacheslide.policies.boundary import BoundaryTokens
from cacheslide.policies.budget import DeviationBudget
from cacheslide.policies.first_tokens import FirstTokens
from cacheslide.policies.none import NoCorrection
from cacheslide.policies.overlap import OverlapTokens
from cacheslide.policies.question_aware import QuestionAware
from cacheslide.policies.registry import load_policy
from cacheslide.policies.remembered import RememberedDeviation
from cacheslide.policies.shrinking import ShrinkingTokens
from cacheslide.policies.top_deviation import TopDeviation
from harness.experiments.real.arms import MIXED
from harness.experiments.wca.cells import EARLY, LATE, Cell

RATIOS = (0.05, 0.1, 0.26, 0.5)
SHARED = (0.1, 0.15)  # for rules that share a budget: 20 % exceeds 0.3 of recompute's compute on this task
FIRST = "first tokens"


def cells(num_layers: int) -> list[Cell]:
    """Every cell that a model of `num_layers` layers can run; the others are compared with its "recompute"."""
    return [Cell("recompute", "reference", "recompute", load_policy("recompute")), *_rules(num_layers)]


def _rules(layers: int) -> Iterator[Cell]:
    policy = load_policy("cacheslide_first_turn")

    def cell(rule: str, option: str, correction: Correction, base: str | None = None, asks: bool = False) -> Cell:
        name = f"{rule}, {option}"
        done = replace(policy, name=name, correction=correction)
        return Cell(name, rule, option, done, base, asks=asks)

    yield cell("no correction", "first turn", NoCorrection())
    for rule, made in {
        FIRST: FirstTokens(),
        "random tokens": RandomTokens(),
        "remembered": RememberedDeviation(),
        "remembered + boundary 8": RememberedDeviation(boundary=8),
        "boundary": BoundaryTokens(),
        "overlap": OverlapTokens(),
        "overlap, half first": OverlapTokens(lead=0.5),
        "shrinking": ShrinkingTokens(every=2),
    }.items():
        for ratio in RATIOS:
            yield cell(rule, f"{ratio:.0%}", made.at_ratio(ratio), None if rule == FIRST else f"{FIRST}, {ratio:.0%}")
    for rule, made in {FIRST: FirstTokens(), "remembered": RememberedDeviation()}.items():
        yield cell(rule, "15%", made.at_ratio(0.15), None if rule == FIRST else f"{FIRST}, 15%")
    for split, made in MIXED.items():
        for ratio in SHARED:
            yield cell(f"mixed, {split}", f"{ratio:.0%}", made.at_ratio(ratio), f"{FIRST}, {ratio:.0%}")
    for left in (0.7, 0.5, 0.3, 0.1):
        yield cell("budget", f"{left:.0%} left", DeviationBudget(left))
    for layer in [i for i in (EARLY, LATE) if i < layers]:
        for ratio in (0.1, 0.26):
            option, base = f"{ratio:.0%}, layer {layer}", f"{FIRST}, {ratio:.0%}"
            yield cell("question-aware", option, QuestionAware(ratio, layer), base, asks=True)
            yield cell("by K", option, TopDeviation(ratio, layer), base)
