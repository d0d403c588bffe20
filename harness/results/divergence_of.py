"""Divergence from recompute of the systems that are timed, from the study on a real model (docs/real.md).

The study names rules, not systems: `LINES` gives the rule of every system that it measured. A rule's ratio counts as
equal to a system's within a factor of `NEAR` (CacheBlend's 18 % is compared at 15 %); the name that was used is given.
Rules with a selection layer are taken at layer 1, as the systems are timed.
"""

import re
from collections.abc import Mapping
from typing import Any

from harness.experiments.serving.arms import Arm
from harness.results.real import POOLED
from harness.systems import policy_of

NEAR = 1.25
SETTING = "matter"  # the updated text holds what the question needs
LINES = {
    "naive_reuse": "Nothing recomputed",
    "cacheslide_mixed": "Mixed, two thirds remembered {}",
    "cacheslide_first": "First tokens {}",
    "cacheslide_remember": "Remembered {}",
    "cacheslide_overlap": "Overlap, half first {}",
    "cacheslide_first_turn": "CacheSlide, by K {} at layer 1",
    "cacheblend": "CacheBlend, by K {} at layer 1",
    "cacheblend_stale": "CacheBlend, stale positions {} at layer 1",
    "cacheblend_gradual": "CacheBlend, gradual {} at layer 1",
    "cacheblend_code": "CacheBlend, as its code {} at layer 1",
    "epic": "EPIC 32 + 32",
    "epic_8": "EPIC 8",
    "epic_16": "EPIC 16",
    "epic_32": "EPIC 32",
    "prophetkv": "ProphetKV {}",
    "prompt_cache": "PromptCache",
    "context_cache": "ContextCache",
    "reorder": "Reordered",
    "window_padding": "Window padding",
}


def kl_rows(study: Mapping[str, Any], confirmed: Mapping[str, Any], setting: str = SETTING) -> dict[str, dict]:
    """KL on the answer by rule, data sets together: of the study, and of rules that only its confirmation measured."""
    out = {}
    for row in confirmed.get("rows", ()):
        if row["key"][0] == setting:
            estimate = {k: row[k] for k in ("value", "low", "high", "n")}
            out[row["key"][-1]] = estimate | {"rule": row["key"][-1], "measured_in": "results/real/confirm.json"}
    for row in study.get("frontier", ()):
        if row["key"][:2] == [setting, POOLED] and "kl" in row["answer"]:
            estimate = row["answer"]["kl"] | {"n": row["n"]}
            out[row["key"][2]] = estimate | {"rule": row["key"][2], "measured_in": "results/real/summary.json"}
    return out


def kl_of(arm: str, rows: Mapping[str, dict]) -> dict[str, Any] | None:
    """The KL of a timed arm; None if no rule of the study is this system at about this ratio."""
    named = Arm.parse(arm)
    line = LINES.get(named.system)
    if line is None or "{}" not in line:
        return None if named.ratio is not None else rows.get(line)
    ratio = policy_of(named.system).correction.total_ratio if named.ratio is None else named.ratio
    pattern = re.compile(re.escape(line).replace(r"\{\}", r"([\d.]+) %"))
    measured = {float(m[1]) / 100: name for name in rows if (m := pattern.fullmatch(name))}
    near = [r for r in measured if max(r / ratio, ratio / r) <= NEAR]
    return rows[measured[min(near, key=lambda r: abs(r - ratio))]] if near else None
