"""Tables of the slice: `python -m harness.results.real_slice RECORDS --out FILE` writes them and prints the means.

The slice is a few arms on at most 20 prompts on any machine (stage `slice` of the study on a real model). Its prompts
are shorter than the study's, so its numbers are not comparable with the study's.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cacheslide.errors import DataError
from harness.experiments.real.arms import slice_arms
from harness.results.provenance import machine
from harness.results.real import POOLED, by_setting, paired, read_stage, setting_of, tabulate
from harness.results.records import write_json
from harness.step import command

SCHEMA = "cacheslide.real-slice/1"


def summarise(folder: Path) -> dict[str, Any]:
    """Rows by arm and the paired ratios between them; DataError without records of the slice."""
    records, failures, settings = read_stage(folder, "slice")
    if not records:
        raise DataError(f"{folder} holds no records of the stage slice")
    nothing, first, isolated, blend = (a.name for a in slice_arms())
    pairs = [
        (one, other, setting)
        for setting in sorted({setting_of(r) for r in records})
        for one, other in ((nothing, isolated), (first, nothing), (first, blend))
    ]
    ratios = [paired(records, *pair) for pair in pairs]
    return {
        "schema": SCHEMA,
        "rows": tabulate(records, by_setting),
        "comparisons": [r for r in ratios if r is not None],
        "failures": len(failures),
        "provenance": {"records": settings[0].get("provenance"), "tables": machine()},
    }


def lines(summary: Mapping[str, Any]) -> list[str]:
    """The printed summary: KL and compute fraction by arm, both data sets together, and the ratios."""
    out = []
    for row in summary["rows"]:
        setting, dataset, arm = row["key"]
        if dataset == POOLED:
            kl = row["answer"]["kl"]
            computed = f"{row['compute_fraction']:.2f} computed"
            out.append(f"{setting}, {arm}: KL {shown_estimate(kl)}, {computed}, n = {row['n']}")
    for ratio in summary["comparisons"]:
        about = f"{ratio['of']} over {ratio['over']}"
        out.append(f"{ratio['setting']}, KL of {about}: {shown_estimate(ratio)}, n = {ratio['n']}")
    return out


def shown_estimate(estimate: Mapping[str, Any]) -> str:
    """A value and its interval, to three digits."""
    if estimate["value"] is None or estimate["low"] is None:
        return f"{estimate['value']} [no interval]"
    return f"{estimate['value']:.3g} [{estimate['low']:.3g}, {estimate['high']:.3g}]"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("records", type=Path)
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args(argv)
    summary = summarise(args.records)
    write_json(args.out, summary)
    print("\n".join(lines(summary)))


if __name__ == "__main__":
    command(main)
