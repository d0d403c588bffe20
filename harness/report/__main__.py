"""Report of a run whose summary and figures exist: `python -m harness.report cpu` writes results/cpu/report.html."""

import argparse
import sys
from pathlib import Path

from cacheslide.errors import CacheSlideError, DataError
from harness.inventory import AGENT_FIGURES, FIGURES
from harness.report import table
from harness.report.builder import REAL, SESSIONS, SLIDE, build_report, read_summary
from harness.report.prose import headline_lines
from harness.results.provenance import ROOT


def main(args: list[str] | None = None) -> int:
    """Command line; an error a user can act on is one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m harness.report", description=__doc__)
    parser.add_argument("run", help="the folder of results/ and figures/")
    parser.add_argument("--root", type=Path, default=ROOT, help="where results/ and figures/ are")
    parser.add_argument("--claims", type=Path, metavar="FILE", help="write the claims table there, as JSON")
    parser.add_argument("--before", type=Path, metavar="FILE", help="earlier verdicts, for --claims")
    parser.add_argument(
        "--headline", action="store_true", help="write nothing: print the headline and the report's path"
    )
    given = parser.parse_args(args)
    results, figures = given.root / "results" / given.run, given.root / "figures" / given.run
    drawn = [figures / f"{name}.svg" for name in (*FIGURES, *AGENT_FIGURES.values())]
    apart = {
        name: given.root / path.relative_to(ROOT)
        for name, path in (("slide", SLIDE), ("real", REAL), ("sessions", SESSIONS))
    }
    try:
        if given.headline:
            return _headline(results)
        build_report(
            results / "summary.json", [path for path in drawn if path.is_file()], results / "report.html", **apart
        )
        if given.claims:
            summary = read_summary(results / "summary.json", **apart)
            table.write(summary, table.rows(summary), given.claims, given.before)
    except (CacheSlideError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(results / "report.html")
    return 0


def _headline(results: Path) -> int:
    """Print the headline of a run's summary and the path of its report, which exists."""
    summary, report = read_summary(results / "summary.json"), results / "report.html"
    if not report.is_file():
        raise DataError(f"there is no report at {report}")
    print("", *headline_lines(summary), "", f"Report: {report}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
