"""`python -m harness.robustness.summary FOLDER --tests FILE --out FILE`: campaigns and marked tests in one summary.

FOLDER holds the campaigns' files; FILE of `--tests` is written by `pytest -m fault --fault-report FILE`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cacheslide.errors import CacheSlideError, DataError
from harness.results.provenance import machine
from harness.results.records import write_json
from harness.robustness.rows import ROWS, outcomes

PARTS = ("bodies", "http_bodies", "entries", "folders", "damage", "writers", "records")


def build(folder: Path, tests: Path) -> dict[str, Any]:
    """The summary; DataError listing every file that is missing or not JSON."""
    parts, missing = {}, []
    for name in (*PARTS, tests.name):
        path = tests if name == tests.name else folder / f"{name}.json"
        try:
            parts[name] = json.loads(path.read_text())
        except (OSError, ValueError):
            missing.append(str(path))
    if missing:
        raise DataError(f"missing or not JSON: {', '.join(missing)}")
    report = parts.pop(tests.name)
    holds = outcomes(report)

    def total(field: str) -> int:
        return sum(part.get(field, 0) for part in parts.values())

    headline = {
        "fault_rows_right": sum(holds.values()),
        "fault_rows": len(ROWS),
        **{name: total(name) for name in ("bodies_tried", "non_400", "engine_deaths", "entries_raised")},
        "wrong_answers": total("wrong_answers"),
        "hostile_folders_tried": total("hostile_folders_tried"),
        "records_lost_in_kills": total("records_lost_in_kills"),
    }
    rows = {
        row: {
            "what": what,
            "holds": holds[row],
            "tests": len(report.get(row, {})),
            "skipped": sum(outcome == "skipped" for outcome in report.get(row, {}).values()),
        }
        for row, what in ROWS.items()
    }
    return {"headline": headline, "rows": rows, "campaigns": parts, "tests": report, "provenance": machine()}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; a missing file gives a one-line error and status 2."""
    parser = argparse.ArgumentParser(prog="python -m harness.robustness.summary", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tests", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        write_json(args.out, build(args.folder, args.tests))
    except CacheSlideError as error:
        print(f"summary: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
