"""CacheSlide against each rival: at its fastest setting with KL at most twice ours, and at equal compute fraction.

Ratios are TTFT of the rival over ours, medians over the same turns of one cell, so that a disturbance hits both.
Rivals are all systems but recompute and CacheSlide's own.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median_high
from typing import Any

from harness.experiments.serving.arms import Arm
from harness.experiments.serving.reproduction.settings import Settings
from harness.metrics.bootstrap import ratio_of_medians
from harness.results.divergence_of import kl_of
from harness.results.intervals import as_json
from harness.results.undisturbed import pick, together, too_few

KL_TIMES = 2.0  # of ours: the largest divergence at which a rival's setting counts
NEAR = 0.05  # of compute fraction: settings that close compute equally much
OWN = "cacheslide"
Record = Mapping[str, Any]
Row = dict[str, Any]


def rivals_of(records: Iterable[Record], settings: Settings, kl: Mapping[str, dict]) -> dict[str, list[Row]]:
    """`pairs`: every rival's setting against ours in a cell; `summary`: the fastest ones that are close enough."""
    pairs = [
        pair
        for record in records
        if record["cell"]["kind"] == "ttft" and record["cell"]["batch"] == 1
        for pair in _pairs(record, settings.ours, kl)
    ]
    lengths = sorted({p["tokens"] for p in pairs if p["reused"] == settings.base["reused"]})
    return {"pairs": pairs, "summary": [_summary(pairs, n, settings) for n in lengths]}


def _pairs(record: Record, ours: str, kl: Mapping[str, dict]) -> Iterable[Row]:
    arms = {name: arm for name, arm in record["arms"].items() if arm["runs"] and not arm["failed"]}
    own = {name: arm for name, arm in arms.items() if Arm.parse(name).system == ours}
    for name, rival in arms.items():
        if "compute_fraction" not in rival["runs"][0] or Arm.parse(name).system.startswith(OWN):
            continue
        for our_name, our in own.items():
            yield {
                "tokens": record["cell"]["tokens"],
                "reused": record["cell"]["reused"],
                "prefix_caching": record["cell"]["prefix_caching"],
                "rival": name,
                "ours": our_name,
                "rival_over_ours": _over(rival["runs"], our["runs"]),
                "compute_fraction": [_fraction(rival), _fraction(our)],
                "kl": [kl_of(name, kl), kl_of(our_name, kl)],
            }


def _fraction(arm: Mapping[str, Any]) -> float:
    return median_high(x for run in arm["runs"] for x in run["compute_fraction"])


def _over(rival: Sequence[Record], ours: Sequence[Record]) -> Row | None:
    """TTFT of the rival over ours; None if too few turns were undisturbed for both."""
    turns = list(zip(rival, ours, strict=False))
    quiet = [together([a.get("quiet"), b.get("quiet")]) for a, b in turns]
    if too_few(quiet):
        return None
    times = [[max(run["ttft"]) for run in of] for of in zip(*pick(turns, quiet), strict=True)]
    return as_json(ratio_of_medians(*times))


def _summary(pairs: Sequence[Row], tokens: int, settings: Settings) -> Row:
    """At one length: the fastest close rival against ours at its own ratio, and the fastest of equal compute."""
    at = [p for p in pairs if p["tokens"] == tokens and p["reused"] == settings.base["reused"] and p["prefix_caching"]]
    known = [p for p in at if p["rival_over_ours"]]
    own = [p for p in known if p["ours"] == settings.ours]
    close = [p for p in own if None not in p["kl"] and p["kl"][0]["value"] <= KL_TIMES * p["kl"][1]["value"]]
    equal = [p for p in known if abs(p["compute_fraction"][0] - p["compute_fraction"][1]) <= NEAR]
    fastest, same = (min(of, key=lambda p: p["rival_over_ours"]["value"], default=None) for of in (close, equal))
    unknown = {Arm.parse(p["rival"]).system for p in at if p["kl"][0] is None}
    return {
        "tokens": tokens,
        "fastest_rival": fastest and fastest["rival"],
        "fastest_rival_over_ours": fastest and fastest["rival_over_ours"],
        "equal_compute": same and {k: same[k] for k in ("rival", "ours", "compute_fraction", "rival_over_ours")},
        "rivals_within_kl": sorted({p["rival"] for p in close}),
        "rivals_without_kl": sorted(unknown),
    }
