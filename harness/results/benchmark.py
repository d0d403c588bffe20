"""The benchmark's headline: `python -m harness.results.benchmark --static FILE ... --claims FILE --out FILE`.

Reads committed result files only: the audits of static choices of models trained from several seeds
(`harness.experiments.rules.static_choices`), the frontier of all systems (`harness.results.frontier`) and the claims
table (`harness.report --claims`). `headline` holds plain numbers, `notes` what each is; tables, conditions and the
sources' hashes stand beside it.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cacheslide.errors import DataError
from cacheslide.policies.registry import policy_names
from harness.experiments.rules import static_choices
from harness.results.provenance import file_hash, provenance
from harness.results.records import write_json
from harness.results.rounding import rounded
from harness.results.runs import read_json
from harness.results.wca import DIGITS
from harness.step import command

SCHEMA = "cacheslide.benchmark/1"
CLAIMS, FRONTIER = "cacheslide.claims/1", "cacheslide.frontier/1"
Table = Mapping[str, Any]
Worst = Callable[..., float]
POOLED: dict[str, Worst] = {  # of the audits' headline, and which mix is the worst case of a number
    "static_choice_gain_points": max,
    "stale_loss_points": min,
    "naive_loss_points": min,
}
NOTES = {
    "static_choice_gain_points": "F1 points of the best static choice at 10 or 26 % above random tokens: mean over "
    "seeds, of the choice whose mean is the largest; the task asks for at most 3",
    "stale_loss_points": "F1 points that stale positions lose to the same KV in place, nothing recomputed: mean over "
    "seeds",
    "naive_loss_points": "F1 points that reuse without correction loses to recompute: mean over seeds",
    "verdict_rules_tested_to_fail": "claims judged by a rule; tests/harness/report/test_verdicts.py has for each of "
    "them a made-up record that the rule must reject, and fails where one is missing",
    "claims_reproduced": "of the paper's figures and headline numbers, each counted once",
}


def read(path: Path, schema: str) -> Table:
    """A result file of a schema; DataError, one line, if it is absent, not JSON or of another schema."""
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    content = read_json(path)
    if not isinstance(content, dict) or content.get("schema") != schema:
        raise DataError(f"{path}: expected a file of schema {schema!r}")
    return content


def read_audits(paths: Sequence[Path]) -> dict[str, Table]:
    """The audits by file name; DataError unless of different models on the same prompts and cells."""
    audits = {path.stem: read(path, static_choices.SCHEMA) for path in paths}
    if len(audits) < len(paths):
        raise DataError("two audits have one file name")
    first, *others = audits
    seen: dict[str, str] = {}
    for name, audit in audits.items():
        model = audit["settings"]["model"]
        if model in seen:
            raise DataError(f"{name} and {seen[model]} audit one model: give each seed once")
        seen[model] = name
    for name in others:
        if _prompts(audits[name]) != _prompts(audits[first]):
            raise DataError(f"{name} and {first} were measured on different prompts")
        if _cells(audits[name]) != _cells(audits[first]):
            raise DataError(f"{name} and {first} do not hold the same cells: one of them is not complete")
    return audits


def _prompts(audit: Table) -> Any:
    counts = {mix: [row["prompts"] for row in rows] for mix, rows in audit["mixes"].items()}
    return {k: v for k, v in audit["settings"].items() if k != "model"}, audit["families"], counts


def _cells(audit: Table) -> dict[str, list[str]]:
    return {mix: [row["cell"] for row in rows] for mix, rows in audit["mixes"].items()}


def pooled(estimates: Sequence[Table | None]) -> dict[str, Any] | None:
    """Mean over seeds of an estimate's value and ends; None without an estimate of every seed.

    The seeds answer the same prompts, so that their errors are not independent: the mean of the ends is the interval
    for errors that are the same in every seed, and wider than one for independent errors. It does not hold the spread
    between seeds, which `lowest` and `highest` show.
    """
    if not estimates or any(e is None for e in estimates):
        return None
    values = [e["value"] for e in estimates]
    out = {key: _mean([e[key] for e in estimates]) for key in ("value", "low", "high")}
    spread = {"lowest": min(values), "highest": max(values)}
    return out | spread | {"n": min(e["n"] for e in estimates), "seeds": len(values)}


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else sum(values) / len(values)


def pooled_rows(audits: Mapping[str, Table], mix: str) -> list[dict[str, Any]]:
    """One row per cell, over the seeds."""
    rows = []
    for same in zip(*(audit["mixes"][mix] for audit in audits.values()), strict=True):
        row = {key: same[0][key] for key in ("cell", "factor", "option")}
        row |= {key: pooled([r[key] for r in same]) for key in ("f1", "loss_points", "gain_points")}
        gains = {name: r["gain_points"] and r["gain_points"]["value"] for name, r in zip(audits, same, strict=True)}
        rows.append(row | {"compute_fraction": same[0]["compute_fraction"], "gain_points_by_seed": gains})
    return rows


def static_table(audits: Mapping[str, Table]) -> dict[str, Any]:
    """By mix: the numbers of `static_choices.headline` over all seeds and of each, and one row per cell."""
    out = {}
    for mix in next(iter(audits.values()))["mixes"]:
        rows = pooled_rows(audits, mix)
        by_seed = {name: audit["headline"][mix] for name, audit in audits.items()}
        out[mix] = {"pooled": static_choices.headline(rows), "by_seed": by_seed, "rows": rows}
    return out


def worst(table: Mapping[str, Table], key: str) -> Table | None:
    """The pooled estimate of a headline number on the mix that speaks most against the task; None if not measured."""
    of_mixes = [{"mix": mix} | t["pooled"][key] for mix, t in table.items() if key in t["pooled"]]
    return POOLED[key](of_mixes, key=lambda e: e["value"]) if of_mixes else None


def systems_of(frontier: Table | None) -> tuple[list[str], str]:
    """The systems that the frontier measured, and where they were counted: its rows' lines, else the registry."""
    if frontier is None:
        return policy_names(), "registered systems: no frontier was given"
    named = sorted({row.get("line", row.get("system")) for row in frontier.get("rows", ())} - {None})
    if not named:
        raise DataError("the frontier holds no rows that name a system")
    return named, "distinct lines of the frontier, a system at several ratios counted once, controls included"


def summarise(audits: Mapping[str, Table], claims: Table, frontier: Table | None) -> dict[str, Any]:
    """The file's content without provenance."""
    static, counts = static_table(audits), claims["counts"]
    systems, counted = systems_of(frontier)
    estimates = {key: worst(static, key) for key in POOLED}
    rules = [row["key"] for row in claims["claims"] if row["has_rule"]]
    one = next(iter(audits.values()))
    return {
        "schema": SCHEMA,
        "headline": {key: e and e["value"] + 0.0 for key, e in estimates.items()}  # no -0.0
        | {
            "systems": len(systems),
            "verdict_rules_tested_to_fail": len(rules),
            "claims_reproduced": counts["reproduced"],
            "claims_partly": counts["partly"],
            "claims_not": counts["not reproduced"],
        },
        "estimates": estimates,
        "notes": NOTES | {"systems": counted},
        "conditions": {
            "static": {k: v for k, v in one["settings"].items() if k != "model"} | {"families": one["families"]},
            "models": {name: audit["settings"]["model"] for name, audit in audits.items()},
            "claims": {key: claims[key] for key in ("run", "model", "records_of", "rules_before")},
        },
        "static": static,
        "systems": systems,
        "rules": rules,
        "claims": {
            "counts": counts,
            "figures": claims["figures"],
            "table": [
                {key: row.get(key) for key in ("key", "figure", "measured_on", "verdict_before", "verdict")}
                for row in claims["claims"]
            ],
        },
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Write the file and print the headline."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--static", type=Path, nargs="+", required=True, help="audits of static choices, one a seed")
    p.add_argument("--claims", type=Path, required=True, help="the claims table as JSON")
    p.add_argument("--frontier", type=Path, help="the frontier; without it `systems` counts the registered ones")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args(argv)
    audits, claims = read_audits(args.static), read(args.claims, CLAIMS)
    frontier = read(args.frontier, FRONTIER) if args.frontier else None
    sources = {p.name: file_hash(p) for p in (*args.static, args.claims, *filter(None, [args.frontier]))}
    made = rounded(summarise(audits, claims, frontier), DIGITS)
    models = "; ".join(audit["settings"]["model"] for audit in audits.values())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, made | {"provenance": provenance({"sources": sources}, sources, models)})
    print(json.dumps(made["headline"], indent=1))


if __name__ == "__main__":
    command(main)
