"""The arms of the study on a real model: every system at every compute fraction that is measured, and the controls.

An arm is a reuse policy with its ratio and layer set. Its family is the origin of the reused KV:

chain    as stored after the previous turn (RPDC; CacheSlide as Algorithm 1 stores it)
canon    encoded in the chain of fixed text alone (RPDC; this project's default)
iso      every passage encoded alone (PIC: CacheBlend, EPIC, ProphetKV)
stale    chain or iso without moving keys to their new positions
other    systems with their own keys or notes: ContextCache, PromptCache, window padding, reordering, KVComm,
         Cache-Craft
exact    recompute with another batching: the noise floor
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from baselines.cache_craft import CacheFix
from baselines.epic import LINKS, LegoLink
from baselines.gradual_filtering import GradualFiltering
from baselines.prompt_cache import SLOT, SLOTS, joint
from baselines.prophetkv import QueryDriven
from baselines.random_tokens import RandomTokens
from cacheslide.core.placement import Placement
from cacheslide.policies.base import Correction, ReusePolicy
from cacheslide.policies.boundary import BoundaryTokens
from cacheslide.policies.budget import DeviationBudget
from cacheslide.policies.edges import EdgeTokens
from cacheslide.policies.first_tokens import FirstTokens
from cacheslide.policies.mixed import MixedTokens
from cacheslide.policies.none import NoCorrection
from cacheslide.policies.overlap import OverlapTokens
from cacheslide.policies.question_aware import QuestionAware
from cacheslide.policies.registry import load_policy
from cacheslide.policies.remembered import RememberedDeviation
from cacheslide.policies.shrinking import ShrinkingTokens
from cacheslide.policies.top_deviation import Swap, TopDeviation

SOURCES = {"chain": "cacheslide_first_turn", "canon": "cacheslide", "iso": "cacheblend"}
NOISE = "recompute in pieces"
RATIOS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.26, 0.4, 0.5)
LAYERS = (1, 3, 5, 8)
ASKED = (5, 8)  # layers of question-based selection, beside the validated one
QUESTION = "Question-aware"
PRINTED = TopDeviation(0.26, fusion="paper", swap=Swap())
NARROW = replace(PRINTED, attends="updated")
MIXED = {
    "half remembered": MixedTokens(remembered=1 / 2, overlap=1 / 2),
    "thirds": MixedTokens(remembered=1 / 3, overlap=1 / 3),
    "two thirds remembered": MixedTokens(remembered=2 / 3, overlap=1 / 3),
}  # the rest of the budget goes to the first tokens
CONFIRMED = (
    "Mixed, half remembered 5 %",
    "Mixed, half remembered 10 %",
    "Mixed, thirds 10 %",
    "Mixed, two thirds remembered 10 %",
    "Mixed, two thirds remembered 15 %",
)


@dataclass(frozen=True)
class Arm:
    """One system at one setting; `policy` is None for the noise floor. `line` joins points of one curve."""

    name: str
    line: str
    family: str
    policy: ReusePolicy | None
    ratio: float | None = None
    layer: int | None = None


def arm(line: str, family: str, correction: Correction, layer: int | None = None) -> Arm:
    """An arm of a family with the given correction."""
    policy, ratio = load_policy(SOURCES[family]), correction.total_ratio
    if layer is not None:
        correction = correction.at_layer(layer)
    return Arm(named(line, ratio, layer), line, family, replace(policy, correction=correction), ratio, layer)


def named(line: str, ratio: float | None, layer: int | None) -> str:
    """The name of an arm of `line`."""
    return line + ("" if ratio is None else f" {100 * ratio:g} %") + ("" if layer is None else f" at layer {layer}")


def swept(line: str, family: str, rule: Correction, ratios: Iterable[float], layers: Iterable[int | None]) -> list[Arm]:
    """One rule at several ratios and layers."""
    return [arm(line, family, rule.at_ratio(r), layer) for layer in layers for r in ratios]


def candidates(num_layers: int) -> list[Arm]:
    """Arms for the validated choice of layers: each rule with a selection layer, at its own ratio."""
    layers = range(1, num_layers // 2 + 1)
    return [
        *swept("CacheBlend, by V", "iso", TopDeviation(0.15, metric="v"), [0.15], layers),
        *swept("CacheBlend, by K", "iso", TopDeviation(0.15, metric="k"), [0.15], layers),
        *swept("CacheSlide, by K", "chain", TopDeviation(0.26), [0.1, 0.26], layers),
        *swept("CacheSlide as printed", "chain", PRINTED, [0.26], layers),
        *swept(QUESTION, "chain", QuestionAware(), [0.1], layers),
    ]


def rules(family: str, before: str, best: Mapping[str, int]) -> list[Arm]:
    """The rules that begin at layer 0, over one family's caches; `before` prefixes the names of their lines."""

    def line(name: str) -> str:
        return before + name[0].lower() + name[1:] if before else name

    asked = sorted({*ASKED, *([best[QUESTION]] if QUESTION in best else [])})
    closest = RememberedDeviation(boundary=32)
    return [
        *swept(line("Remembered"), family, RememberedDeviation(), (0.02, 0.05, 0.1, 0.15, 0.2, 0.26, 0.4), [None]),
        *swept(line("Remembered + boundary 32"), family, closest, (0.05, 0.1, 0.2), [None]),
        *swept(line("Boundary"), family, BoundaryTokens(), (0.05, 0.1, 0.2), [None]),
        *swept(line(QUESTION), family, QuestionAware(), (0.05, 0.1, 0.2), asked),
        *swept(line("Shrinking"), family, ShrinkingTokens(), (0.1, 0.2), [None]),
        *[budget(line("Budget, left"), family, left) for left in (0.5, 0.3)],
        *swept(line("Overlap"), family, OverlapTokens(), (0.05, 0.1, 0.2), [None]),
        *swept(line("Overlap, half first"), family, OverlapTokens(lead=0.5), (0.05, 0.1, 0.2), [None]),
        *mixed(line("Mixed, "), family, (0.05, 0.1, 0.15)),
    ]


def mixed(before: str, family: str, ratios: Iterable[float]) -> list[Arm]:
    """Every split of a budget between rules; `before` prefixes the names of their lines."""
    return [one for split, rule in MIXED.items() for one in swept(before + split, family, rule, ratios, [None])]


def budget(line: str, family: str, left: float) -> Arm:
    """A rule without a ratio: it recomputes tokens until `left` of the remembered deviation remains."""
    made = arm(line, family, DeviationBudget(left))
    return replace(made, name=f"{line} {100 * left:g} %")


def frontier(best: Mapping[str, int] | None = None) -> list[Arm]:
    """The whole frontier. `best` holds the validated layer by line; layers of `LAYERS` are swept as well, so that no
    curve depends on that choice."""
    best = dict(best or {})

    def layers(line: str) -> list[int]:
        return sorted({*LAYERS, *([best[line]] if line in best else [])})

    chosen = best.get("CacheSlide as printed", 1)
    return [
        Arm(NOISE, NOISE, "exact", None),
        arm("Nothing recomputed", "chain", NoCorrection()),
        *swept("First tokens", "chain", FirstTokens(), RATIOS, [None]),
        *swept("Random tokens", "chain", RandomTokens(), (0.1, 0.26, 0.5), [None]),
        *rules("chain", "", best),
        *swept("CacheSlide, by K", "chain", TopDeviation(0.26), (0.05, 0.1, 0.26, 0.5), layers("CacheSlide, by K")),
        arm("CacheSlide as printed", "chain", PRINTED, chosen),
        arm("CacheSlide as printed, updated keys only", "chain", NARROW, chosen),
        arm("Canonical, nothing recomputed", "canon", NoCorrection()),
        *swept("Canonical, first tokens", "canon", FirstTokens(), (0.05, 0.1, 0.26), [None]),
        *rules("canon", "Canonical, ", best),
        arm("Isolated, nothing recomputed", "iso", NoCorrection()),
        *swept("Isolated, remembered", "iso", RememberedDeviation(), (0.15,), [None]),
        *swept("Isolated, random tokens", "iso", RandomTokens(), (0.15, 0.5), [None]),
        *swept("CacheBlend, by V", "iso", TopDeviation(0.15, metric="v"), (0.05, 0.15, 0.3, 0.5),
               layers("CacheBlend, by V")),
        *swept("CacheBlend, by K", "iso", TopDeviation(0.15), (0.15, 0.3), layers("CacheBlend, by K")),
        *swept("CacheBlend, gradual", "iso", GradualFiltering(0.15), (0.05, 0.15, 0.3), layers("CacheBlend, by V")),
        *swept("CacheBlend, as its code", "iso", GradualFiltering(0.15, steps=1), (0.15,), layers("CacheBlend, by V")),
        arm("EPIC 32 + 32", "iso", EdgeTokens(32, 32)),
        *[arm(f"EPIC {k}", "iso", LegoLink(k)) for k in LINKS],
        *swept("ProphetKV", "iso", QueryDriven(), (0.1, 0.2, 0.4), [None]),
        *others(),
    ]  # fmt: skip


def core(best: Mapping[str, int] | None = None) -> list[Arm]:
    """The arms measured on every prompt, for the claims and the headline."""
    chosen = dict.fromkeys(("CacheSlide, by K", "CacheBlend, by V"), 1) | {QUESTION: ASKED[0]} | dict(best or {})
    wanted = {
        NOISE,
        "Nothing recomputed",
        *(f"First tokens {n} %" for n in (2, 5, 10, 15, 20, 26)),
        "Random tokens 10 %",
        "Random tokens 26 %",
        *(f"CacheSlide, by K {n} % at layer 1" for n in (5, 10, 26)),
        "Canonical, nothing recomputed",
        "Canonical, first tokens 10 %",
        "Isolated, nothing recomputed",
        *(f"CacheBlend, by V {n} % at layer {layer}" for n in (5, 15, 30) for layer in (1, 3)),
        *(f"CacheBlend, by K {n} % at layer 1" for n in (15, 30)),
        *(f"Remembered {n} %" for n in (5, 10, 20, 26)),
        "Remembered + boundary 32 10 %",
        "Canonical, remembered 5 %",
        "Canonical, remembered 10 %",
        *(f"Overlap {n} %" for n in (5, 10, 20)),
        *(f"Overlap, half first {n} %" for n in (5, 10)),
        *(f"Mixed, {split} 10 %" for split in MIXED),
        "Mixed, two thirds remembered 15 %",
        "Boundary 10 %",
        "Shrinking 20 %",
        f"{QUESTION} 10 % at layer {chosen[QUESTION]}",
        f"CacheSlide, by K 26 % at layer {chosen['CacheSlide, by K']}",
        f"CacheBlend, by V 15 % at layer {chosen['CacheBlend, by V']}",
        *(f"CacheBlend, gradual 15 % at layer {layer}" for layer in (1, 3)),
        "PromptCache, joint, slot 256",
        "Reordered",
        "EPIC 8",
        "EPIC 16",
        "EPIC 32",
        "EPIC 32 + 32",
        "Chain, stale positions",
        "CacheBlend, stale positions 15 % at layer 1",
    }
    return [one for one in frontier(best) if one.name in wanted or one.line.startswith("CacheSlide as printed")]


def others() -> list[Arm]:
    """Systems with keys or positions of their own, and stale positions."""
    stale = Placement("stored")
    chain, iso = (replace(load_policy(SOURCES[f]), placement=stale) for f in ("chain", "iso"))
    craft = load_policy("cache_craft")
    return [
        Arm("Chain, stale positions", "Stale positions", "stale", replace(chain, correction=NoCorrection())),
        Arm("CacheBlend, stale positions 15 % at layer 1", "Stale positions", "stale",
            replace(iso, correction=TopDeviation(0.15)), 0.15, 1),
        Arm("ContextCache", "ContextCache", "other", load_policy("context_cache")),
        Arm("PromptCache", "PromptCache", "other", load_policy("prompt_cache")),
        *[Arm(f"PromptCache, joint, slot {n}", "PromptCache, joint", "other", joint(n)) for n in (*SLOTS, SLOT)],
        Arm("Reordered", "Reordered", "other", load_policy("reorder")),
        Arm("Window padding", "Window padding", "other", load_policy("window_padding")),
        Arm("KVComm", "KVComm", "other", load_policy("kvcomm")),
        *[Arm(f"Cache-Craft, α = {a:g}", "Cache-Craft", "other", replace(craft, correction=CacheFix(a)))
          for a in (0.5, 1.0, 2.0)],
    ]  # fmt: skip


def slice_arms() -> list[Arm]:
    """The arms of the small slice: one per claim."""
    return [
        arm("Nothing recomputed", "chain", NoCorrection()),
        *swept("First tokens", "chain", FirstTokens(), (0.1,), [None]),
        arm("Isolated, nothing recomputed", "iso", NoCorrection()),
        *swept("CacheBlend, by V", "iso", TopDeviation(0.15, metric="v"), (0.15,), [1]),
    ]


def history_arms(best: Mapping[str, int] | None = None) -> list[Arm]:
    """The arms measured over many turns, with caches kept from turn to turn."""
    layer = (best or {}).get("CacheBlend, by V", 1)
    return [
        Arm(NOISE, NOISE, "exact", None),
        arm("Nothing recomputed", "chain", NoCorrection()),
        *swept("First tokens", "chain", FirstTokens(), (0.02, 0.1, 0.2), [None]),
        *swept("Remembered", "chain", RememberedDeviation(), (0.1,), [None]),
        *swept("Overlap", "chain", OverlapTokens(), (0.1,), [None]),
        *swept("Overlap, half first", "chain", OverlapTokens(lead=0.5), (0.1,), [None]),
        *mixed("Mixed, ", "chain", (0.1,)),
        *swept("CacheSlide, by K", "chain", TopDeviation(0.26), (0.26,), [1]),
        arm("Isolated, nothing recomputed", "iso", NoCorrection()),
        *swept("CacheBlend, by V", "iso", TopDeviation(0.15, metric="v"), (0.15,), [layer]),
        Arm("KVComm", "KVComm", "other", load_policy("kvcomm")),  # its anchors are earlier turns
    ]


def confirm_arms(best: Mapping[str, int] | None = None) -> list[Arm]:
    """The arms for prompts not used in choosing rules: the rules and their baselines."""
    layer = (best or {}).get("CacheBlend, by V", 1)
    return [
        Arm(NOISE, NOISE, "exact", None),
        arm("Nothing recomputed", "chain", NoCorrection()),
        *swept("First tokens", "chain", FirstTokens(), (0.1,), [None]),
        *swept("Remembered", "chain", RememberedDeviation(), (0.1,), [None]),
        *swept("Overlap, half first", "chain", OverlapTokens(lead=0.5), (0.05, 0.1), [None]),
        *[one for one in mixed("Mixed, ", "chain", (0.05, 0.1, 0.15)) if one.name in CONFIRMED],
        *swept("CacheBlend, by V", "iso", TopDeviation(0.15, metric="v"), (0.15,), [layer]),
    ]


def replay_arms(best: Mapping[str, int] | None = None) -> list[Arm]:
    """As `history_arms`, without systems that need scores or notes, which replayed turns do not store."""
    bare = [one for one in history_arms(best) if one.policy is None or not one.policy.memory.name]
    return [one for one in bare if one.policy is None or not one.policy.needs_scores]


def unique(arms: Sequence[Arm]) -> list[Arm]:
    """`arms` without repeated names."""
    return list({a.name: a for a in arms}.values())
