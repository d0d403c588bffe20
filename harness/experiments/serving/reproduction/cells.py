"""The cells of a reproduction: one axis varied at a time around a base point, all systems in every cell.

A cell is measured as a whole, its arms taking turns. Its kind says how:

ttft      `engine_ttft.once`: one batch of prompts at a time in an engine of this process
energy    the same requests back to back for `energy_s` seconds an arm, beside NVML
grid      `ttft` for CacheSlide's recompute ratio x threshold (figure 14)
server    a streaming client in a closed loop against a server, one system and number of clients a cell
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import ceil

from cacheslide.errors import PolicyError
from cacheslide.policies.base import ReusePolicy
from cacheslide.policies.registry import load_policy, policy_names
from cacheslide.policies.top_deviation import Swap
from cacheslide.vllm.systems import check_served
from harness.experiments.serving.arms import Arm
from harness.experiments.serving.engine_ttft import PREFIX_CACHE
from harness.experiments.serving.prompts import FRONT
from harness.experiments.serving.reproduction.settings import Settings
from harness.systems import VANILLA, scalable

RECOMPUTE, IDEAL = "recompute", "prefix_cache_ideal"
HEADLINE_RATIOS = (0.05, 0.1)  # of ours, beside its own, in every cell
WIDE = 16384  # beside the base point, the length at which recompute ratios are swept
GRID = "cacheslide"  # the system whose threshold is varied, the paper's own


@dataclass(frozen=True)
class Cell:
    """One cell; `device` is that of a server's chunk store, None for vLLM by itself."""

    kind: str
    axis: str
    tokens: int
    batch: int
    reused: float
    arms: tuple[str, ...]
    prefix_caching: bool = True
    repeats: int = 0
    part: int = 0
    device: str | None = None

    @property
    def id(self) -> str:
        """Its name, unique in a plan."""
        system = f" {self.arms[0]}" if self.kind == "server" else ""
        cache = "" if self.prefix_caching else " without prefix cache"
        part = f" part {self.part + 1}" if self.part else ""
        return f"{self.kind} {self.axis}{system} {self.tokens}x{self.batch} {self.reused:.0%}{cache}{part}"

    @property
    def point(self) -> tuple[int, int, float]:
        """Tokens, requests at once, share reused."""
        return self.tokens, self.batch, self.reused


def points(settings: Settings) -> Iterator[tuple[str, int, int, float]]:
    """Axis, tokens, batch and share reused of every point, the base point once."""
    base = settings.base
    yield "base", base["tokens"], base["batch"], base["reused"]
    for axis, name, values in (
        ("tokens", "tokens", settings.tokens),
        ("batch", "batch", settings.batches),
        ("reused", "reused", settings.reused),
    ):
        for value in values:
            if value != base[name]:
                at = base | {name: value}
                yield axis, at["tokens"], at["batch"], at["reused"]


def systems(settings: Settings) -> tuple[list[str], dict[str, str]]:
    """The systems that vLLM serves, and the others with the reason."""
    served, refused = [], {}
    for name in settings.systems or policy_names():
        policy = load_policy(name)
        try:
            check_served(policy, settings.layers)
        except PolicyError as wrong:
            refused[name] = str(wrong)
            continue
        if policy.reuses:
            served.append(name)
    return served, refused


def beyond_slots(policy: ReusePolicy, tokens: int, reused: float) -> str:
    """The point, if a system with slots (PromptCache) cannot reuse at it; empty if it can.

    An updated text takes a multiple of the slot's positions: where two turns' take different multiples, chunks move.
    """
    slot = policy.placement.slot
    if not slot:
        return ""
    shortest, longest = (max(1, int(tokens * (1 - reused) * x)) for x in FRONT)
    if ceil(shortest / slot) == ceil(longest / slot):
        return ""
    return f"{tokens} tokens, {reused:.0%} reused ({shortest} to {longest} updated in front)"


def cells(settings: Settings) -> tuple[list[Cell], dict[str, str]]:
    """All cells of a plan before sizes are looked at, and what is left out, by name, with the reason."""
    served, refused = systems(settings)
    out: list[Cell] = []
    for axis, *point in points(settings):
        arms = _arms_at(settings, served, point, refused)
        out.append(Cell("ttft", axis, *point, (RECOMPUTE, PREFIX_CACHE, IDEAL, *arms), repeats=settings.repeats))
    base = out[0]
    arms = tuple(a for a in base.arms if a not in (PREFIX_CACHE, IDEAL))
    out.append(replace(base, arms=arms, prefix_caching=False))
    swept = [Arm(s, ratio).name for s in scalable(served) for ratio in settings.ratios]
    for cell in (base, replace(base, tokens=WIDE)):
        if swept and (cell is base or WIDE in settings.tokens):
            out.append(replace(cell, axis="ratios", arms=(RECOMPUTE, *swept)))
    alone = tuple(a for a in base.arms if a != IDEAL)  # whose run is two requests
    out.append(replace(base, kind="energy", arms=alone, repeats=max(3, settings.repeats // 2)))
    if settings.taus and settings.tensor_parallel == 1:
        grid = [Arm(name, r).name for name in grid_systems(settings) for r in settings.ratios]
        out.append(replace(base, kind="grid", axis="threshold", arms=(RECOMPUTE, *grid)))
    elif settings.taus:
        refused["ratio x threshold"] = "thresholds are registered in one process, which tensor parallelism is not"
    out += servers(settings, served, base)
    return out, refused


def _arms_at(settings: Settings, served: Iterable[str], point: list, refused: dict[str, str]) -> Iterator[str]:
    tokens, _, reused = point
    for name in served:
        policy = load_policy(name)
        if where := beyond_slots(policy, tokens, reused):
            slot = f"updated text takes different multiples of its slot of {policy.placement.slot} at"
            before = refused.get(f"{name}, partly", "")
            if where not in before:
                refused[f"{name}, partly"] = f"{before}; {where}" if before else f"{slot} {where}"
        else:
            yield name
    yield from (Arm(settings.ours, ratio).name for ratio in HEADLINE_RATIOS)


def servers(settings: Settings, served: Iterable[str], base: Cell) -> Iterator[Cell]:
    """Cells against servers: vLLM with and without prefix cache, then every system, at each number of clients."""
    for name in (*VANILLA, *served):
        device = None if name in VANILLA else settings.store_device
        for clients in settings.clients:
            if name in VANILLA or not beyond_slots(load_policy(name), base.tokens, base.reused):
                yield replace(base, kind="server", axis="clients", batch=clients, arms=(name,), device=device)


def grid_systems(settings: Settings) -> dict[str, ReusePolicy]:
    """The paper's system with every threshold, by the name under which it is registered for a stage."""
    policy = load_policy(GRID)
    return {
        f"{GRID}_tau_{tau:g}": replace(
            policy, name=f"{GRID}_tau_{tau:g}", correction=replace(policy.correction, swap=Swap(tau))
        )
        for tau in settings.taus
    }
