"""A made-up study on a real model for tests of its tables, report and figures: invented numbers in true records.

Never a result: only tests call it.
"""

from typing import Any

from harness.experiments.real.arms import NOISE
from harness.experiments.real.trials import SETTINGS
from harness.results.real import SCHEMA, by_agent, by_setting, by_turn, comparisons, headline, tabulate

# arm: KL, compute fraction, share of prompts whose greedy text changes
ARMS: dict[str, tuple[float, float, float]] = {
    NOISE: (0.001, 1.0, 0.2),
    "Nothing recomputed": (0.02, 0.05, 0.4),
    "First tokens 10 %": (0.012, 0.15, 0.2),
    "First tokens 20 %": (0.010, 0.25, 0.2),
    "Remembered 10 %": (0.011, 0.15, 0.2),
    "Remembered + boundary 32 10 %": (0.0105, 0.15, 0.2),
    "Boundary 10 %": (0.013, 0.15, 0.2),
    "Question-aware 10 % at layer 5": (0.009, 0.17, 0.2),
    "Shrinking 20 %": (0.0115, 0.17, 0.2),
    "Budget, left 50 %": (0.0095, 0.2, 0.2),
    "CacheSlide as printed 26 % at layer 3": (0.03, 0.6, 0.4),
    "CacheSlide, by K 26 % at layer 5": (0.008, 0.5, 0.2),
    "Canonical, nothing recomputed": (0.022, 0.05, 0.4),
    "Canonical, first tokens 10 %": (0.013, 0.15, 0.2),
    "Canonical, remembered 10 %": (0.012, 0.15, 0.2),
    "Isolated, nothing recomputed": (0.5, 0.05, 0.8),
    "EPIC 32 + 32": (0.2, 0.35, 0.6),
    "CacheBlend, by V 15 % at layer 1": (0.25, 0.25, 0.8),
    "CacheBlend, by V 15 % at layer 6": (0.125, 0.45, 0.6),
    "CacheBlend, stale positions 15 % at layer 1": (4.0, 0.25, 1.0),
    "Chain, stale positions": (3.0, 0.05, 1.0),
    "ContextCache": (0.0015, 0.99, 0.2),
    "PromptCache": (0.3, 0.5, 0.6),
    "Window padding": (3.5, 0.04, 1.0),
}
PROMPTS = 5  # a data set and setting


def record(trial: str, dataset: str, arm: str, at: int, factor: float = 1.0, **more: Any) -> dict[str, Any]:
    """One arm on one prompt; `at` of `PROMPTS` says whether its greedy text changes, and moves its KL a little."""
    kl, compute, flips = ARMS[arm]
    scores = {"kl": kl * factor * (0.9 + 0.05 * at), "agreement": 0.9, "nll_change": 0.01}
    return {
        "id": f"{trial} | {arm}",
        "trial": trial,
        "dataset": dataset,
        "arm": arm,
        "tokens": 1000,
        "tokens_reused": 900,
        "compute_fraction": compute,
        "answer": scores,
        "greedy": scores | {"agreement": 1.0 if (same := at >= flips * PROMPTS) else 0.9, "greedy_equal": same},
    } | more


def summary(factors: dict[str, dict[str, float]] | None = None) -> dict[str, Any]:
    """The tables; `factors[setting][arm]` multiplies an arm's KL."""
    factors = factors or {}
    records = [
        record(f"{setting} {name} {at}", name, arm, at, factors.get(setting, {}).get(arm, 1.0))
        for setting in SETTINGS
        for name in ("hotpotqa", "musique")
        for at in range(PROMPTS)
        for arm in ARMS
    ]
    few = (NOISE, "Nothing recomputed", "Isolated, nothing recomputed")
    turns = [record(f"h{at}", "hotpotqa", a, at, turn=t) for at in range(PROMPTS) for t in (3, 11) for a in few]
    replayed = [record(f"s{at}", "reflexion-react", a, at) for at in range(PROMPTS) for a in few]
    rows = tabulate(records, by_setting)
    ratios = comparisons(records, rows)
    conditions = {
        "model": "gemma3-270m",
        "dtype": "bfloat16",
        "seed": 0,
        "data": ["a.jsonl", "b.json"],
        "best": {"CacheBlend, by V": 6, "CacheSlide, by K": 5},
    }
    return {
        "schema": SCHEMA,
        "headline": headline(rows, ratios, PROMPTS),
        "conditions": {"frontier": conditions},
        "provenance": {"frontier": {"git_commit": "0" * 40, "gpus": [{"name": "some GPU"}]}},
        "frontier": rows,
        "comparisons": ratios,
        "histories": tabulate(turns, by_turn),
        "replay": tabulate(replayed, by_agent),
        "failures": 0,
    }
