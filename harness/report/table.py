"""The claims table: every claim its finding, and the numbers of this project's own rules and of the real model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cacheslide.errors import DataError
from harness.inventory import AGENT_NAMES, FIGURES
from harness.plots.task_labels import task_of
from harness.report import own_rules, tally
from harness.report.claims_real import beside
from harness.report.paper import CLAIMS
from harness.report.verdicts import Basis, Claim, Finding, Summary, judge
from harness.results.records import write_json
from harness.results.runs import read_json

SCHEMA = "cacheslide.claims/1"


@dataclass(frozen=True)
class Row:
    """A claim, its finding, and further numbers without effect on the verdict."""

    claim: Claim
    finding: Finding
    own_rules: str
    real_model: str
    measured_on: str


def rows(summary: Summary) -> list[Row]:
    """Every claim judged on `summary`, in the paper's order."""
    return [
        Row(
            claim,
            judge(claim, summary),
            own_rules.beside(claim.key, summary),
            beside(claim.key, summary),
            measured_on(claim, summary),
        )
        for claim in CLAIMS
    ]


def tasks_of(summary: Summary) -> str:
    """The synthetic tasks of the run's questions, such as "stress task"; empty without such questions."""
    return " and the ".join(sorted({task for r in summary["accuracy"] if (task := task_of(r["name"]))}))


def measured_on(claim: Claim, summary: Summary) -> str:
    """The claim's basis; for numbers of the run's own prompts the task that these are of."""
    of_agents = claim.key.removeprefix("fig10-") in AGENT_NAMES
    if claim.basis is Basis.STRESS and claim.target in FIGURES and not of_agents:
        return tasks_of(summary).replace(" task", "") or claim.basis.value
    return claim.basis.value


def counted(table: Sequence[Row]) -> str:
    """The number of the paper's figures by verdict, in words."""
    return tally.sentence([r.claim for r in table], [r.finding for r in table])


def as_json(summary: Summary, table: Sequence[Row], before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The table as plain JSON values.

    Parameters
    ----------
    summary : dict
        Summary that the table was judged on; its run, model and code are named.
    table : sequence of Row
    before : mapping, optional
        Earlier verdicts, as `read_before` gives them: `rules_of` and, by claim, `verdict` and `why` it changed.

    Returns
    -------
    dict
        `figures`: the verdict on each of the paper's figures, counted once; `counts`: their number by verdict;
        `claims`: one object per row.
    """
    figures = tally.by_figure([r.claim for r in table], [r.finding for r in table])
    earlier = before["claims"] if before else {}
    claims = []
    for row in table:
        claim, then = row.claim, earlier.get(row.claim.key, {})
        one = {
            "key": claim.key,
            "figure": claim.figure,
            "counts_as": claim.counts_as,
            "claim": claim.text,
            "paper": claim.paper,
            "measured_on": row.measured_on,
            "verdict": row.finding.verdict.value,
            "measured": row.finding.measured,
            "own_rules": row.own_rules,
            "real_model": row.real_model,
            "rule": claim.rule,
            "has_rule": claim.has_rule,
            "target": claim.target,
        }
        if before:
            one |= {"verdict_before": then.get("verdict", ""), "why": then.get("why", "")}
        claims.append(one)
    return {
        "schema": SCHEMA,
        "run": summary["run"],
        "model": summary["conditions"]["model"],
        "records_of": summary["provenance"].get("git_commit"),
        "rules_before": before["rules_of"] if before else None,
        "counts": tally.counts(figures.values()),
        "figures": {figure: verdict.value for figure, verdict in figures.items()},
        "claims": claims,
    }


def read_before(path: str | Path) -> dict[str, Any]:
    """Earlier verdicts; DataError unless the file has `rules_of` and a verdict for each claim that it names."""
    given = read_json(path)
    verdicts = given.get("claims") if isinstance(given, dict) else None
    if not isinstance(verdicts, dict) or not all(isinstance(v, dict) and "verdict" in v for v in verdicts.values()):
        raise DataError(f"{path}: expected `rules_of`, and under `claims` a verdict by claim")
    if unknown := sorted(set(verdicts) - {c.key for c in CLAIMS}):
        raise DataError(f"{path}: no such claim: {', '.join(unknown)}")
    return {"rules_of": given.get("rules_of", "")} | given


def write(summary: Summary, table: Sequence[Row], path: str | Path, before: str | Path | None = None) -> None:
    """Write `as_json` to `path`."""
    write_json(path, as_json(summary, table, read_before(before) if before else None))
