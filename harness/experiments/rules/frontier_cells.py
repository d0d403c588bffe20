"""Cells of the frontier on the ledger task: the systems of `harness.experiments.real.arms`, at this task's settings.

A setting is a system at one ratio. One that selects at a layer has a cell per candidate layer, of which one is chosen
on prompts of their own (`harness.experiments.rules.frontier`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from baselines import window_padding
from cacheslide.errors import PolicyError
from cacheslide.policies.registry import load_policy
from harness.experiments.real.arms import Arm, frontier, named
from harness.experiments.wca.cells import Cell

RECOMPUTE = "Recompute"
NOTHING, STALE, ISOLATED = "Nothing recomputed", "Chain, stale positions", "Isolated, nothing recomputed"
RANDOM, DEFAULT = "Random tokens", "Mixed, two thirds remembered"
DEFAULT_RATIO = 0.15  # of `cacheslide_mixed`, the default system
LAYERS = (1, 4, 6, 8, 12, 16)
ASKED = (8, 18)  # a prefill per question each; the ledger model's question looks its entries up at layer 18
COMMON = (0.05, 0.1, 0.26)
BLENDED = (0.05, 0.15, 0.26)
# Ratios of the systems that have one, by line of the study on a real model. Its systems without a ratio all run too.
RATIOS = {
    "First tokens": COMMON,
    RANDOM: COMMON,
    "Remembered": COMMON,
    "Overlap": COMMON,
    "Overlap, half first": COMMON,
    DEFAULT: (*COMMON[:2], DEFAULT_RATIO, COMMON[2]),
    "Question-aware": COMMON,
    "CacheSlide, by K": COMMON,
    "CacheSlide as printed": (0.26,),
    "CacheSlide as printed, updated keys only": (0.26,),
    "Isolated, remembered": (0.15,),
    "CacheBlend, by V": BLENDED,
    "CacheBlend, by K": BLENDED,
    "CacheBlend, gradual": BLENDED,
    "CacheBlend, as its code": (0.15,),
    "CacheBlend, stale positions": (0.15,),
    "ProphetKV": (0.1, 0.2, 0.4),
}
WINDOWS = (256, 512)  # beside the system's own: updated text of this task exceeds it


@dataclass(frozen=True)
class Setting:
    """A system at one ratio; `cells` by candidate layer, or one cell under None."""

    name: str
    line: str
    family: str
    ratio: float | None
    cells: dict[int | None, Cell]

    @property
    def layered(self) -> bool:
        """Whether a layer is to be chosen."""
        return None not in self.cells


def settings(num_layers: int) -> list[Setting]:
    """Every setting that a model of `num_layers` layers can run, recompute first."""
    exact = Cell(RECOMPUTE, RECOMPUTE, RECOMPUTE, load_policy("recompute"))
    arms = [a for a in frontier() if a.policy is not None]
    out = [Setting(RECOMPUTE, RECOMPUTE, "exact", None, {None: exact})]
    out += [_setting([a]) for a in (*_fixed(arms), *_windows())]
    for line, ratios in RATIOS.items():
        one = next(a for a in arms if _line(a) == line)
        layers: Sequence[int | None] = (None,) if one.layer is None else ASKED if one.policy.asks else LAYERS
        for ratio in ratios:
            swept = [a for a in (_at(one, ratio, layer) for layer in layers) if _runs(a, num_layers)]
            if swept:
                out.append(_setting(swept))
    return out


def _fixed(arms: Sequence[Arm]) -> Iterator[Arm]:
    """Systems with neither ratio nor layer; of the canonical chain only reuse without correction."""
    for one in arms:
        if one.ratio is None and one.layer is None and (one.family != "canon" or "nothing" in one.line):
            yield one


def _windows() -> Iterator[Arm]:
    for window in WINDOWS:
        policy = window_padding.policy(window)
        yield Arm(f"Window padding, {window}", "Window padding", "other", replace(policy, name=f"window_{window}"))


def _line(one: Arm) -> str:
    """The line of an arm: a name without ratio and layer where the study on a real model has none."""
    return "CacheBlend, stale positions" if one.name.startswith("CacheBlend, stale") else one.line


def _at(one: Arm, ratio: float, layer: int | None) -> Arm:
    """The arm at another ratio and layer."""
    policy, line = one.policy.at_ratio(ratio), _line(one)
    if layer is not None:
        policy = policy.at_layer(layer)
    return Arm(named(line, ratio, layer), line, one.family, policy, ratio, layer)


def _runs(one: Arm, num_layers: int) -> bool:
    """Whether a model of so many layers has the arm's layer, and one behind it that reuses what was chosen."""
    try:
        one.policy.check(num_layers)
    except PolicyError:
        return False
    return one.layer is None or one.layer + 1 < num_layers


def _setting(arms: Sequence[Arm]) -> Setting:
    first = arms[0]
    name = first.name if first.layer is None else named(first.line, first.ratio, None)
    cells = {a.layer: Cell(a.name, a.line, name, a.policy, None, a.policy.probe_layers, a.policy.asks) for a in arms}
    return Setting(name, first.line, first.family, first.ratio, cells)


def batches(cells: Sequence[Cell], size: int = 6) -> list[list[Cell]]:
    """Cells in groups that share chunk caches, of at most `size`; a cell with a prefill per question is alone."""
    groups: dict[tuple, list[Cell]] = {}
    for cell in cells:
        own = cell.name if cell.asks else None
        groups.setdefault((cell.policy.recipe, cell.policy.needs_scores, own), []).append(cell)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]
