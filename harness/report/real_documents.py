"""Tables of the real model's study in documents: `python -m harness.report.real_documents FILE.md ...` fills them.

A table with the first column `arm` or `comparison` takes its numbers from results/real/summary.json; columns are
settings (KL on the answer and share of compute), `KL` of a setting, `computed` or `greedy text changed` (of the setting
matter). Rows begin with an arm's name in backticks, any words following, or with a comparison: one of `COMPARED`, or
a rule in backticks "over nothing recomputed".

A table with the first column `rule on other prompts` takes its ratios from results/real/confirm.json; columns are a
setting in backticks and the rule's denominator, or `confirmed`.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cacheslide.errors import DataError
from harness.report.words import significant
from harness.results import real_confirm
from harness.results.real import POOLED, SCHEMA
from harness.results.runs import read_json
from harness.step import command

SUMMARY = Path("results/real/summary.json")
CONFIRMATION = Path("results/real/confirm.json")
MAIN = "matter"
COMPARED = {
    "RPDC over PIC": "rpdc over pic",
    "first tokens over nothing recomputed": "ours over nothing recomputed",
    "first tokens over the best CacheBlend within 33 % of compute": "ours over the best CacheBlend",
}
COLUMN = re.compile(r"(KL, )?`?(unrelated|matter|shift|contradict)`?|computed|greedy text changed")
OTHER = "rule on other prompts"
OTHER_COLUMN = re.compile(rf"`(\w+)`, ({real_confirm.OVER_NOTHING}|{real_confirm.OVER_RIVAL})|confirmed")
Summary = Mapping[str, Any]


def filled(text: str, summary: Summary, confirmation: Summary | None = None) -> str:
    """`text` with these tables' numbers from `summary` and `confirmation`.

    DataError for an arm, a rule or a setting missing there.
    """
    out: list[str] = []
    heads: list[str] = []
    for line in text.splitlines():
        cells = [c.strip() for c in line.split("|")[1:-1]] if line.startswith("|") else []
        if not cells:
            heads = []
        elif cells[0] in ("arm", "comparison"):
            heads = cells if all(COLUMN.fullmatch(head) for head in cells[1:]) else []
        elif cells[0] == OTHER:
            heads = cells if all(OTHER_COLUMN.fullmatch(head) for head in cells[1:]) else []
        elif heads and not set(line) <= set("|- "):
            if heads[0] == OTHER:
                cells[1:] = [on_other_prompts(confirmation or {}, cells[0], head) for head in heads[1:]]
            else:
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
    """One paired ratio of `summary`."""
    rule = re.fullmatch(r"`([^`]+)` over nothing recomputed", first)
    wanted = ("rule over nothing recomputed", rule[1]) if rule else (COMPARED.get(first), None)
    for c in summary["comparisons"]:
        if (c["comparison"], c.get("rule"), c["setting"], c["dataset"]) == (*wanted, setting, POOLED):
            low, high = significant(c["low"]), significant(c["high"])
            arms = "" if rule else f" (`{c['of']}` / `{c['over']}`)"
            return f"{significant(c['value'])} [{low}, {high}]{arms}"
    raise DataError(f"the study has no comparison {first!r} in the setting {setting}")


def on_other_prompts(confirmation: Summary, first: str, head: str) -> str:
    """One ratio of a rule on held-out prompts, both data sets together, or whether it is confirmed."""
    rule, column = first.strip("`"), OTHER_COLUMN.fullmatch(head)
    if rule not in confirmation.get("confirmed", {}):
        raise DataError(f"the confirmation has no rule {first!r}")
    if head == "confirmed":
        return "yes" if confirmation["confirmed"][rule] else "no"
    for row in confirmation["ratios"]:
        if row["key"] == [column[1], POOLED, rule] and row.get(column[2]):
            value, low, high = (significant(row[column[2]][x]) for x in ("value", "low", "high"))
            return f"{value} [{low}, {high}]"
    raise DataError(f"the confirmation has no {rule!r} {column[2]} in the setting {column[1]}")


def main(argv: Sequence[str] | None = None) -> None:
    """Fill the tables of documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=Path, nargs="+")
    parser.add_argument("--summary", type=Path, default=SUMMARY)
    parser.add_argument("--confirmation", type=Path, default=CONFIRMATION)
    args = parser.parse_args(argv)
    summary = _read(args.summary, SCHEMA)
    confirmation = _read(args.confirmation, real_confirm.SCHEMA)
    for path in args.documents:
        path.write_text(filled(path.read_text(), summary, confirmation))


def _read(path: Path, wanted: str) -> Summary:
    raw = read_json(path)
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema != wanted:
        raise DataError(f"{path}: schema {schema!r}, expected {wanted!r}")
    return raw


if __name__ == "__main__":
    command(main)
