"""Tables of the real model's study in documents: `python -m harness.report.real_documents FILE.md ...` fills them.

A table whose first column is headed `arm` or `comparison` has its numbers from results/real/summary.json; columns are
settings (KL on the answer and share of compute), `KL` of a setting, `computed` or `greedy text changed` (of the setting
matter). Rows begin with an arm's name in backticks, whatever words follow, or with a comparison: of `COMPARED`, or
a rule in backticks "over nothing recomputed".
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cacheslide.errors import DataError
from harness.report.words import significant
from harness.results.real import POOLED, SCHEMA
from harness.results.runs import read_json
from harness.step import command

SUMMARY = Path("results/real/summary.json")
MAIN = "matter"
COMPARED = {
    "RPDC over PIC": "rpdc over pic",
    "first tokens over nothing recomputed": "ours over nothing recomputed",
    "first tokens over the best CacheBlend within 33 % of compute": "ours over the best CacheBlend",
}
COLUMN = re.compile(r"(KL, )?`?(unrelated|matter|shift|contradict)`?|computed|greedy text changed")
Summary = Mapping[str, Any]


def filled(text: str, summary: Summary) -> str:
    """`text` with every such table's numbers from `summary`; DataError for an arm or setting that it lacks."""
    out: list[str] = []
    heads: list[str] = []
    for line in text.splitlines():
        cells = [c.strip() for c in line.split("|")[1:-1]] if line.startswith("|") else []
        if not cells:
            heads = []
        elif cells[0] in ("arm", "comparison"):
            heads = cells if all(COLUMN.fullmatch(head) for head in cells[1:]) else []
        elif heads and not set(line) <= set("|- "):
            name = comparison if heads[0] == "comparison" else arm
            cells[1:] = [name(summary, cells[0], head) for head in heads[1:]]
            line = f"| {' | '.join(cells)} |"
        out.append(line)
    return "\n".join(out) + "\n"


def arm(summary: Summary, first: str, head: str) -> str:
    """One cell of an arm's row, or of the row `n`."""
    setting = (COLUMN.fullmatch(head) or [])[2] or MAIN
    rows = {r["key"][2]: r for r in summary["frontier"] if r["key"][:2] == [setting, POOLED]}
    most = max((r["n"] for r in rows.values()), default=0)
    if first == "n":
        return str(most)
    named = re.match(r"`([^`]+)`", first)
    if named is None or named[1] not in rows:
        raise DataError(f"the study has no arm {first!r} in the setting {setting}")
    row = rows[named[1]]
    few = f" (n {row['n']})" if row["n"] < most else ""
    if head == "computed":
        return f"{row['compute_fraction']:.2f}"
    if head == "greedy text changed":
        return f"{100 * row['flips']['value']:.0f} %{few}"
    kl = row["answer"]["kl"]
    share = "" if "KL" in head else f", {100 * row['compute_fraction']:.0f} %"
    return f"{significant(kl['value'])} [{significant(kl['low'])}, {significant(kl['high'])}]{share}{few}"


def comparison(summary: Summary, first: str, setting: str) -> str:
    """One paired ratio and what was compared."""
    rule = re.fullmatch(r"`([^`]+)` over nothing recomputed", first)
    wanted = ("rule over nothing recomputed", rule[1]) if rule else (COMPARED.get(first), None)
    for c in summary["comparisons"]:
        if (c["comparison"], c.get("rule"), c["setting"], c["dataset"]) == (*wanted, setting, POOLED):
            low, high = significant(c["low"]), significant(c["high"])
            arms = "" if rule else f" (`{c['of']}` / `{c['over']}`)"
            return f"{significant(c['value'])} [{low}, {high}]{arms}"
    raise DataError(f"the study has no comparison {first!r} in the setting {setting}")


def main(argv: Sequence[str] | None = None) -> None:
    """Fill the tables of documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=Path, nargs="+")
    parser.add_argument("--summary", type=Path, default=SUMMARY)
    args = parser.parse_args(argv)
    summary = read_json(args.summary)
    schema = summary.get("schema") if isinstance(summary, dict) else None
    if schema != SCHEMA:
        raise DataError(f"{args.summary}: schema {schema!r}, expected {SCHEMA!r}")
    for path in args.documents:
        path.write_text(filled(path.read_text(), summary))


if __name__ == "__main__":
    command(main)
