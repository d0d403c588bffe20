"""The rule for figure 5's shift under RoPE, judged on recorded sessions of real agents (results/real/sessions.json).

Generated prompts are no evidence: their generator draws the length of the updated text for each turn, so their fixed
segments move by construction.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from cacheslide.errors import DataError
from harness.report.verdicts import Finding, NotMeasured, NotTestable, Summary, grade, joined
from harness.report.words import interval, number, percent
from harness.results.intervals import ratio_of_sums

SCHEMA = "cacheslide.sessions/1"
HALF = 0.5  # of the text that recurs in order behind the shared prefix


def check(recorded: Mapping[str, Any], path: Any) -> None:
    """DataError unless the sessions have the schema that the rule reads."""
    if recorded.get("schema") != SCHEMA:
        raise DataError(f"{path}: schema {recorded.get('schema')!r}, expected {SCHEMA!r}")


def shifted_positions(summary: Summary) -> Finding:
    """Fig. 5, RoPE: most text that recurs in order behind the shared prefix lies at another position than before.

    By group, resampling sessions. A group without such text (only the prefix recurs) has no shift.
    """
    recorded = summary.get("sessions")
    if not recorded:
        if any(r["displacement"] for r in summary.get("prompts") or []):
            raise NotTestable("by construction: generated prompts move because their generator moves them")
        raise NotMeasured("results/real/sessions.json is not there: docs/real.md says how it is made")
    grades, parts = [], []
    for name, group in recorded["groups"].items():
        sessions = [s for s in recorded["sessions"] if s["group"] == name]
        spans = [(s["id"], length, shift) for s in sessions for _, length, shift, in_order in s["spans"] if in_order]
        total = sum(group["tokens"][kind] for kind in ("prefix", "order_preserving", "reordered", "new"))
        where = f"{name} ({len(sessions)} sessions)"
        if not spans:
            grades.append(grade({"value": 0.0, "low": 0.0, "high": 0.0}, HALF, no_effect=HALF))
            parts.append(f"{where}: nothing recurs in order behind the prefix")
            continue
        ids, lengths, shifts = zip(*spans, strict=True)
        moved = ratio_of_sums([n if d else 0 for n, d in zip(lengths, shifts, strict=True)], lengths, ids)
        grades.append(grade(moved, HALF, no_effect=HALF))
        share = sum(lengths) / total
        parts.append(
            f"{where}: {percent(moved['value'])} {interval(moved, percent)} of it moved, by a median of "
            f"{number(_middle(lengths, shifts), 0)} tokens; it is {percent(share)} of all prompt tokens"
        )
    text = "text that recurs in order behind the shared prefix: " + "; ".join(parts)
    notes = [n for n in recorded.get("notes", []) if "of one task" in n]
    return Finding(joined(*grades), "; ".join([text, *notes]) + "; generated prompts move by construction")


def _middle(lengths: Sequence[int], shifts: Sequence[int]) -> float:
    """Median of |shift| over tokens."""
    order = sorted(zip(map(abs, shifts), lengths, strict=True))
    half, seen = sum(lengths) / 2, 0
    for shift, length in order:
        seen += length
        if seen >= half:
            return float(shift)
    return 0.0
