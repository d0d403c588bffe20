"""Every claim's verdict before and now, with the reason: `python -m harness.report.changes --claims FILE --out FILE`.

Writes a Markdown page from the claims table (`python -m harness.report RUN --claims FILE --before FILE`).
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cacheslide.errors import DataError
from harness.report.table import SCHEMA
from harness.report.verdicts import Basis
from harness.results.runs import read_json
from harness.step import command

ON = {
    Basis.STRESS: "generated tasks whose answers depend on reuse, and small models trained for them",
    Basis.REAL: "a pretrained model on real text",
    Basis.SESSIONS: "prompts of real agents, without a model",
    Basis.SHAPES: "layers of a real model's shape with random weights",
    Basis.NOTHING: "nothing: not run",
}
HEAD = """# Verdicts before and now

Written by `python -m harness.report.changes --claims results/benchmark/claims.json --out docs/claims.md`; not edited by
hand. The rules before are those of {rules_before}, both on the records of `results/{run}` and those beside it.
`results/benchmark/claims.json` has every rule and every measured number, `results/benchmark/claims_before.json` the
verdicts before and the reasons. Of the paper's figures and headline numbers, each counted once over its rows, now
{counts}.

`on` is what the evidence was measured on: {on}.
A row that counts as no figure is a question of this study's own.
"""
NAMES = ("figure", "claim", "on", "counts as", "before", "now", "what changed and why")
KEYS = ("figure", "claim", "measured_on", "counts_as", "verdict_before", "verdict", "why")


def page(made: Mapping[str, Any]) -> str:
    """The page of a claims table with earlier verdicts."""
    rows = made["claims"]
    changed = [r for r in rows if r["verdict"] != r["verdict_before"]]
    same = [r for r in rows if r["verdict"] == r["verdict_before"]]
    head = HEAD.format(
        rules_before=made["rules_before"],
        run=made["run"],
        counts=", ".join(f"{n} {name}" for name, n in made["counts"].items() if n),
        on="; ".join(f"`{basis.value}`, {text}" for basis, text in ON.items()),
    )
    parts = [head]
    for title, some in ((f"## Changed ({len(changed)})", changed), (f"## The same verdict ({len(same)})", same)):
        parts.append(f"{title}\n\n" + "".join([_line(NAMES), _line(["---"] * len(NAMES)), *map(_cells, some)]))
    return "\n".join(parts)


def _cells(row: Mapping[str, Any]) -> str:
    return _line([row[key].replace("|", "\\|") or "–" for key in KEYS])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def read(path: Path) -> dict[str, Any]:
    """A claims table with earlier verdicts; DataError, one line, for anything else."""
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    made = read_json(path)
    if not isinstance(made, dict) or made.get("schema") != SCHEMA:
        raise DataError(f"{path}: expected a claims table of schema {SCHEMA!r}")
    if any("verdict_before" not in row for row in made["claims"]):
        raise DataError(f"{path} has no earlier verdicts: write it with --before")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--claims", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args(argv)
    args.out.write_text(page(read(args.claims)), encoding="utf-8")


if __name__ == "__main__":
    command(main)
