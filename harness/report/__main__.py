"""Report of a run whose summary and figures exist: `python -m harness.report cpu` writes results/cpu/report.html."""

import argparse
import sys
from pathlib import Path

from cacheslide.errors import CacheSlideError
from harness.inventory import AGENT_FIGURES, FIGURES
from harness.report.builder import REAL, SLIDE, build_report
from harness.results.provenance import ROOT


def main(args: list[str] | None = None) -> int:
    """Command line; an error a user can act on is one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m harness.report", description=__doc__)
    parser.add_argument("run", help="the folder of results/ and figures/")
    parser.add_argument("--root", type=Path, default=ROOT, help="where results/ and figures/ are")
    given = parser.parse_args(args)
    results, figures = given.root / "results" / given.run, given.root / "figures" / given.run
    drawn = [figures / f"{name}.svg" for name in (*FIGURES, *AGENT_FIGURES.values())]
    try:
        build_report(
            results / "summary.json",
            [path for path in drawn if path.is_file()],
            results / "report.html",
            slide=given.root / SLIDE.relative_to(ROOT),
            real=given.root / REAL.relative_to(ROOT),
        )
    except (CacheSlideError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(results / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
