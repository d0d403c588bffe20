"""`python -m harness.robustness NAME ... --minutes M --out FOLDER`: run campaigns, one JSON file each.

A campaign is a module of this package with `run(minutes, seed, work)`; it returns a flat dict of counts and lists
(inputs tried, failures, examples) and takes about `minutes` at most. `work` is an empty folder for this campaign. Exit
status 1 if a campaign's "faults" is not 0.
"""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

from harness.results.provenance import machine
from harness.results.records import write_json

CAMPAIGNS = ("bodies", "http_bodies", "entries", "folders", "damage", "writers", "records")


def main(argv: list[str] | None = None) -> int:
    """Run the named campaigns; all of them if no name is given."""
    parser = argparse.ArgumentParser(prog="python -m harness.robustness", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CAMPAIGNS)}; all without any")
    parser.add_argument("--minutes", type=float, default=2.0, help="for each campaign (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for NAME.json")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.names) - set(CAMPAIGNS)):
        parser.error(f"no campaign {', '.join(unknown)} (known: {', '.join(CAMPAIGNS)})")
    worst = 0
    for name in args.names or CAMPAIGNS:
        campaign = importlib.import_module(f"harness.robustness.{name}")
        with tempfile.TemporaryDirectory(prefix=f"robustness-{name}-") as work:
            counts = campaign.run(args.minutes, args.seed, Path(work))
        write_json(args.out / f"{name}.json", {"campaign": name, "seed": args.seed, **counts, "machine": machine()})
        shown = " ".join(f"{k}={v}" for k, v in counts.items() if isinstance(v, int | float))
        print(f"{name}: {shown}", flush=True)
        worst = max(worst, int(bool(counts.get("faults"))))
    return worst


if __name__ == "__main__":
    sys.exit(main())
