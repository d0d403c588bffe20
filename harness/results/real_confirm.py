"""Confirms rules on prompts they were not chosen on: `python -m harness.results.real_confirm RECORDS --out FILE`.

Records are of the stage `confirm` of the study on a real model. Each rule's KL on the answer is compared with that of
nothing recomputed, and of CacheBlend by V at 15 %, paired, with intervals over prompts. A rule is confirmed if its
ratio to nothing recomputed is at most `GOAL` in every setting, data sets together, over at least `LEAST` prompts and
with the whole interval below 1.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cacheslide.errors import DataError
from harness.experiments.real.arms import NOISE
from harness.results.provenance import machine
from harness.results.real import CONDITIONS, NOTHING, POOLED, RIVALS, by_setting, paired, read_stage, short, tabulate
from harness.results.real_records import rule_and_layer
from harness.results.real_slice import shown_estimate
from harness.results.records import write_json
from harness.results.rounding import rounded
from harness.step import command

SCHEMA = "cacheslide.real-confirm/1"
GOAL = 0.7  # of the KL with nothing recomputed
LEAST = 30  # prompts: fewer give no usable interval
OVER_NOTHING, OVER_RIVAL = "over nothing recomputed", "over CacheBlend 15 %"
ESTIMATE = ("value", "low", "high")


def summarise(folder: Path) -> dict[str, Any]:
    """KL by setting and arm, ratios by setting, set and rule, and verdicts; DataError without records of the stage."""
    records, failures, settings = read_stage(folder, "confirm")
    if not records:
        raise DataError(f"{folder} holds no records of the stage confirm")
    rows = tabulate(records, by_setting)
    arms = {r["key"][2] for r in rows}
    rival = next((a for a in sorted(arms) if rule_and_layer(a)[0] in RIVALS), None)
    rules = sorted(arms - {NOISE, NOTHING, rival})
    places = sorted({tuple(r["key"][:2]) for r in rows})
    others = {OVER_NOTHING: NOTHING} | ({OVER_RIVAL: rival} if rival else {})
    ratios = [
        {"key": [*place, rule]} | {name: _ratio(records, rule, other, *place) for name, other in others.items()}
        for place in places
        for rule in rules
    ]
    about = settings[0]
    return {
        "schema": SCHEMA,
        "conditions": {k: about.get(k) for k in (*CONDITIONS, "settings", "without")},
        "rival": rival,
        "rows": [_row(r) for r in rows if r["key"][1] == POOLED],
        "ratios": ratios,
        "confirmed": {rule: confirmed(ratios, rule) for rule in rules},
        "failures": len(failures),
        "provenance": {"records": about.get("provenance"), "tables": machine()},
    }


def confirmed(ratios: Sequence[Mapping[str, Any]], rule: str) -> bool:
    """Whether the rule meets `GOAL` in every setting, over both data sets together."""
    own = [r[OVER_NOTHING] for r in ratios if r["key"][1:] == [POOLED, rule]]
    measured = bool(own) and all(r and r["n"] >= LEAST and r["high"] is not None for r in own)
    return measured and all(r["value"] <= GOAL and r["high"] < 1 for r in own)


def _ratio(records: Sequence[dict], rule: str, other: str, setting: str, dataset: str) -> dict[str, Any] | None:
    ratio = paired(records, rule, other, setting, dataset)
    return ratio and {k: short(ratio[k]) for k in ("n", *ESTIMATE)}


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    kl = {k: row["answer"]["kl"][k] for k in ESTIMATE}
    return {"key": [row["key"][0], row["key"][2]], "n": row["n"], "compute_fraction": row["compute_fraction"]} | kl


def lines(summary: Mapping[str, Any]) -> list[str]:
    """The printed summary: KL and compute by arm, the ratios, and the confirmed rules."""
    out = [f"{r['key'][0]}, {r['key'][1]}: KL {shown_estimate(r)}, {r['compute_fraction']:.2f} computed, n = {r['n']}"
           for r in summary["rows"]]  # fmt: skip
    for ratio in summary["ratios"]:
        about = ", ".join(ratio["key"])
        out += [
            f"{about} {name}: {shown_estimate(r)}, n = {r['n']}" for name, r in ratio.items() if name != "key" and r
        ]
    return out + [f"{'' if holds else 'not '}confirmed: {rule}" for rule, holds in summary["confirmed"].items()]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("records", type=Path)
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args(argv)
    summary = rounded(summarise(args.records))
    write_json(args.out, summary)
    print("\n".join(lines(summary)))


if __name__ == "__main__":
    command(main)
